// The first visit: a name and a code, then the guidelines. Later visits: the key that the browser kept.

import { button, fill, make } from "./dom.js";
import { renderMarkdown } from "./markdown.js";
import { ask, Refused } from "./net.js";

const KEY = "rlhf-rank-key";
const READ = "rlhf-rank-guidelines";

/** Return the labeler's key that this browser keeps, or null. */
export function storedKey() {
  return localStorage.getItem(KEY);
}

/** Return the labeler whose key this browser keeps, or null; lets silence through. */
export async function labelerOfThisBrowser() {
  const key = storedKey();
  if (!key) return null;
  try {
    return (await ask("POST", "/api/session", { key })).labeler;
  } catch (error) {
    if (error instanceof Refused && (error.status === 400 || error.body.need === "labeler")) return null;
    throw error;
  }
}

/** Show the form of the first visit, and give the labeler. */
export function signIn(main) {
  return new Promise((resolve) => {
    const problem = make("p", { class: "problem", role: "alert" });
    const name = make("input", { id: "name", autocomplete: "name", maxLength: 80, required: true });
    const code = make("input", { id: "code", autocomplete: "off", maxLength: 20, pattern: "[A-Za-z0-9][A-Za-z0-9_\\-]*", "aria-describedby": "code-hint" });
    const form = make("form", { class: "panel" },
      make("h2", { text: "Who ranks?" }),
      make("p", { text: "You will read a few answers to the same question and say which are better." }),
      make("label", { htmlFor: "name", text: "Your name" }), name,
      make("label", { htmlFor: "code", text: "A code that stands for you in the data (may stay empty)" }), code,
      make("p", { id: "code-hint", class: "soft", text: "Letters and digits, not an e-mail address. The name itself is never written into the data." }),
      problem, make("div", { class: "row" }, make("button", { type: "submit", class: "main-action", text: "Begin" })));
    const key = make("input", { id: "key", autocomplete: "off", maxLength: 200, required: true });
    const again = make("form", { class: "panel" },
      make("details", {}, make("summary", { text: "I have been here before, in another browser" }),
        make("label", { htmlFor: "key", text: "Your key (there: Menu, Another browser)" }), key,
        make("div", { class: "row" }, make("button", { type: "submit", text: "Go on" }))));

    async function attempt(path, body) {
      problem.textContent = "";
      try {
        const answer = await ask("POST", path, body);
        localStorage.setItem(KEY, answer.key || body.key);
        resolve(answer.labeler);
      } catch (error) {
        problem.textContent = error instanceof Refused ? error.message : "The server does not answer. Try again in a moment.";
      }
    }
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      attempt("/api/labelers", { name: name.value.trim(), code: code.value.trim() || null });
    });
    again.addEventListener("submit", (event) => {
      event.preventDefault();
      attempt("/api/session", { key: key.value.trim() });
    });
    fill(main, form, again);
    name.focus();
  });
}

/** Show the guidelines if this browser has not shown this text yet; wait until they are read. */
export function readGuidelines(main, guidelines) {
  const seen = localStorage.getItem(READ);
  if (seen === guidelines.digest) return Promise.resolve();
  return new Promise((resolve) => {
    const go = button("Start ranking", () => {
      localStorage.setItem(READ, guidelines.digest);
      resolve();
    }, { class: "main-action" });
    fill(main, make("section", { class: "panel" },
      make("h2", { tabIndex: -1, text: seen ? "The guidelines have changed: please read them again" : "Please read this first" }),
      renderMarkdown(guidelines.markdown),
      make("p", { class: "soft", text: "They stay beside each task." }), make("div", { class: "row" }, go)));
    main.querySelector("h2").focus();
  });
}
