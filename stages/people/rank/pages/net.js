// Ask the server. An answer, a refusal and silence are three different things.

const PATIENCE = 15_000; // ms until a request counts as unanswered

/** A refusal: the server's status and its sentence. */
export class Refused extends Error {
  constructor(status, body) {
    super(body.error || `The server refused this (${status}).`);
    this.status = status;
    this.body = body;
  }
}

/** No answer: the server is down, or the network. */
export class Unreachable extends Error {}

/**
 * Send a request and return the parsed answer; after `patience` milliseconds it counts as silence.
 * @throws {Refused} for a status of 400 or more (503 and 429 count as no answer: they pass)
 * @throws {Unreachable} when nothing, or nothing readable, comes back
 */
export async function ask(method, path, body = undefined, patience = PATIENCE) {
  let response;
  let answer;
  try {
    response = await fetch(path, {
      method,
      credentials: "same-origin",
      cache: "no-store",
      headers: body === undefined ? { "X-RLHF": "1" } : { "X-RLHF": "1", "Content-Type": "application/json" },
      body: body === undefined ? undefined : JSON.stringify(body),
      signal: AbortSignal.timeout(patience),
    });
    answer = await response.json();
  } catch (error) {
    if (response && response.status >= 400) throw new Refused(response.status, {});
    throw new Unreachable(String(error));
  }
  if (response.status === 503 || response.status === 429) throw new Unreachable(answer.error || "busy");
  if (!response.ok) throw new Refused(response.status, answer);
  return answer;
}

/** Wait so many milliseconds, or until the browser says that the network is back. */
export function pause(ms) {
  return new Promise((resolve) => {
    const timer = setTimeout(done, ms);
    function done() {
      clearTimeout(timer);
      removeEventListener("online", done);
      resolve();
    }
    addEventListener("online", done);
  });
}

/**
 * Ask until there is an answer or a refusal.
 * @param {(waiting: boolean) => void} onWaiting told true at the first silence, false at its end
 */
export async function askUntilAnswered(method, path, body, onWaiting) {
  let wait = 500;
  for (let tries = 0; ; tries += 1) {
    try {
      const answer = await ask(method, path, body);
      if (tries > 0) onWaiting(false);
      return answer;
    } catch (error) {
      if (!(error instanceof Unreachable)) {
        if (tries > 0) onWaiting(false);
        error.tries = tries;
        throw error;
      }
      onWaiting(true);
      await pause(wait);
      wait = Math.min(2 * wait, 5000);
    }
  }
}
