// The AI SDK with @ai-sdk/openai, whose default is the Responses API.

import { createOpenAI } from "@ai-sdk/openai";
import { generateObject, generateText, streamText, tool } from "ai";
import { z } from "zod";

const prompt = "Add a 150 mm brick wall";
const model = createOpenAI({ baseURL: `${process.env.GATEWAY_URL}/v1`, apiKey: "none" })(process.env.GATEWAY_MODEL);
const schema = z.object({ material: z.enum(["brick", "concrete"]), thickness_mm: z.number().int() });
const tools = { add_wall: tool({ description: "Adds.", inputSchema: schema }) };

async function call(toolChoice) {
  const answer = await generateText({ model, prompt, tools, toolChoice, maxRetries: 0 });
  const [one] = answer.toolCalls;
  return { name: one.toolName, arguments: one.input, id: answer.response.id };
}

const capabilities = {
  async chat() {
    const answer = await generateText({ model, prompt, maxRetries: 0 });
    return { text: answer.text, id: answer.response.id };
  },
  async stream() {
    const answer = streamText({ model, prompt, maxRetries: 0, onError: ({ error }) => { throw error; } });
    const pieces = [];
    for await (const piece of answer.textStream) pieces.push(piece);
    return { text: pieces.join(""), pieces: pieces.length, id: (await answer.response).id };
  },
  async second_turn() {
    const first = await generateText({ model, prompt, maxRetries: 0 });
    const turns = [{ role: "user", content: prompt }, ...first.response.messages]; // refers to the first answer by its id
    const answer = await generateText({ model, messages: [...turns, { role: "user", content: "And a door" }], maxRetries: 0 });
    return { first: first.text, id: answer.response.id };
  },
  async structured() {
    const answer = await generateObject({ model, schema, prompt, maxRetries: 0 });
    return { value: answer.object, id: answer.response.id };
  },
  forced_tool: () => call({ type: "tool", toolName: "add_wall" }),
  auto_tool: () => call("auto"),
};

console.log(JSON.stringify(await capabilities[process.argv[2]]()));
