// Talk to the server: JSON, and answers that come in pieces.

const HEADERS = { "Content-Type": "application/json", "X-RLHF": "1" };

export class Refused extends Error {
  constructor(status, sentence) {
    super(sentence);
    this.status = status;
  }
}

async function refusal(response) {
  let sentence = `the server answered ${response.status}`;
  try {
    sentence = (await response.json()).error ?? sentence;
  } catch { /* no JSON: the status has to do */ }
  return new Refused(response.status, sentence);
}

async function reach(path, options) {
  try {
    return await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused(0, "the server cannot be reached; is it running?");
  }
}

export async function get(path) {
  const response = await reach(path, {});
  if (!response.ok) throw await refusal(response);
  return response.json();
}

export async function post(path, body = {}) {
  const response = await reach(path, { method: "POST", headers: HEADERS, body: JSON.stringify(body) });
  if (!response.ok) throw await refusal(response);
  return response.json();
}

// Call `heard` with each event; throw if the connection ends before the last one.
export async function ask(body, heard, signal) {
  const options = { method: "POST", headers: HEADERS, body: JSON.stringify(body), signal };
  const response = await reach("/api/ask", options);
  if (!response.ok) throw await refusal(response);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let ended = false;
  for (;;) {
    let part;
    try {
      part = await reader.read();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      break;
    }
    if (part.done) break;
    const lines = (rest + part.value).split("\n\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ")) continue;
      const event = JSON.parse(line.slice(6));
      ended = ended || event.type === "end";
      heard(event);
    }
  }
  if (!ended) throw new Refused(0, "the connection has ended before the answer did; ask again");
}
