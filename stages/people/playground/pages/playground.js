// The page: settings, what is kept, the conversation, and the question that comes next.

import { goesOn, newAnswer, show, titleOf } from "./answer.js";
import { find, make, say } from "./dom.js";
import { ask, get, post } from "./talk.js";

const NUMBERS = ["temperature", "top_p", "top_k", "max_tokens", "seed"];
let setup = null;
let running = null;
let conversation = null; // number of a conversation that is kept
let kept = 0; // conversations of this browser that are kept, this one included
let exchanges = [];
let views = [];

const checked = (id) => find(id).checked;
const chosen = () => [...document.querySelectorAll("#policies input:checked")].map((input) => input.value);
const report = (text) => { find("problem").textContent = text; };

// -- what the browser remembers -------------------------------------------------------------------

function remember() {
  const options = { policies: chosen(), blind: checked("blind"), scored: checked("scored"), consent: checked("consent") };
  for (const id of NUMBERS) options[id] = find(id).value;
  localStorage.setItem(`playground ${setup.experiment}`, JSON.stringify(options));
  const talk = { exchanges, conversation, system: find("system").value, kind: find("kind").value };
  try {
    sessionStorage.setItem("talk", JSON.stringify(talk));
  } catch { /* full: a reload then begins anew */ }
}

function read(store, key) {
  try {
    return JSON.parse(store.getItem(key)) ?? {};
  } catch {
    return {};
  }
}

// -- settings -------------------------------------------------------------------------------------

function fill() {
  const saved = read(localStorage, `playground ${setup.experiment}`);
  find("experiment").textContent = setup.experiment;
  document.title = `Playground · ${setup.experiment}`;
  const before = (saved.policies ?? []).filter((name) => setup.policies.includes(name));
  const on = before.length ? before : setup.policies.slice(0, 2);
  for (const name of setup.policies) {
    const box = make("input", { type: "checkbox", value: name });
    box.checked = on.includes(name);
    find("policies").append(make("label", { class: "choice" }, box, make("span", {}, name)));
  }
  for (const id of NUMBERS) find(id).value = saved[id] ?? setup.defaults[id] ?? "";
  find("max_tokens").max = setup.max_tokens_limit;
  find("text").maxLength = setup.longest;
  find("blind").checked = saved.blind ?? false;
  find("scored").checked = setup.scored && (saved.scored ?? true);
  find("scored").closest("label").hidden = !setup.scored;
  find("consent").checked = saved.consent ?? false;
  find("consent-text").textContent = setup.consent;
  find("kind").append(make("option", { value: "" }, "not said"));
  for (const kind of setup.kinds) find("kind").append(make("option", { value: kind }, kind.replaceAll("_", " ")));
  find("settings").open = window.matchMedia("(min-width: 60rem)").matches;
}

function body(text) {
  const sent = {
    text, policies: chosen(), blind: checked("blind"), scored: checked("scored"), consent: checked("consent"),
    system: find("system").value, kind: find("kind").value || null,
  };
  for (const id of NUMBERS) {
    if (!find(id).checkValidity()) {
      find("settings").open = true;
      find(id).focus();
      throw new Error(`${find(id).closest("label").firstChild.textContent.trim()}: ${find(id).validationMessage}`);
    }
    const value = find(id).value.trim();
    sent[id] = value === "" ? null : Number(value);
  }
  const before = exchanges.filter((exchange) => exchange.answers.some(goesOn));
  if (sent.consent) {
    const last = before.at(-1);
    const answer = last?.answers[last.goOn];
    Object.assign(sent, { conversation, after: answer?.id ?? null, corrected: Boolean(answer?.correction) });
  } else {
    sent.history = before.flatMap((exchange) => [
      { role: "user", content: exchange.text },
      { role: "assistant", content: exchange.answers[exchange.goOn].text },
    ]);
  }
  return sent;
}

// -- the conversation -----------------------------------------------------------------------------

function refresh() {
  const isRunning = running !== null;
  const some = exchanges.length > 0;
  find("empty").hidden = some;
  find("stop").hidden = !isRunning;
  find("send").disabled = isRunning;
  find("system").disabled = find("kind").disabled = some;
  find("fixed").hidden = !some;
  find("blind").disabled = chosen().length < 2;
  find("consent").disabled = find("new").disabled = find("delete").disabled = find("delete-all").disabled = isRunning;
  const isKept = conversation !== null;
  document.querySelector(".consent").classList.toggle("on", checked("consent"));
  find("kept").textContent = isKept ? "This conversation is kept." : some ? "This conversation is not kept; feedback on answers needs the switch." : "";
  find("delete").hidden = !isKept;
  const others = kept - (isKept ? 1 : 0);
  find("delete-all").hidden = others < 1;
  find("delete-all").textContent = `Delete all that I shared (${kept === 1 ? "1 conversation" : `${kept} conversations`})`;
  remember();
}

function add(exchange) {
  for (const other of exchanges) other.isLast = false;
  exchange.isLast = true;
  exchanges.push(exchange);
  views.forEach((view) => view.draw());
  const view = show(exchange, refresh, report);
  views.push(view);
  find("talk").append(view.element);
  return view;
}

function begin() {
  exchanges = [];
  views = [];
  conversation = null;
  find("talk").replaceChildren();
  report("");
  refresh();
}

// Choose the answer that the conversation goes on with, where nobody has: the first that can be gone on with.
function settle(exchange) {
  if (!goesOn(exchange.answers[exchange.goOn])) exchange.goOn = Math.max(0, exchange.answers.findIndex(goesOn));
  for (const answer of exchange.answers) {
    if (["waiting", "running"].includes(answer.state)) {
      Object.assign(answer, { state: "failed", sentence: "stopped: this answer is not part of the conversation" });
    }
  }
}

async function send(text, sent) {
  let exchange = null;
  let view = null;
  running = new AbortController();
  refresh();
  const heard = (event) => {
    const answer = exchange?.answers[event.side];
    if (event.type === "start") {
      if (event.conversation && event.conversation !== conversation) kept += 1;
      conversation = event.conversation ?? null;
      const names = event.names ?? Array(event.sides).fill(null);
      exchange = {
        number: exchanges.length + 1, text, conversation, seq: event.seq ?? null, seed: event.seed, goOn: 0, tiers: null, key: null,
        answers: names.map(newAnswer),
      };
      view = add(exchange);
      find("text").value = "";
      view.element.scrollIntoView({ block: "start" });
    } else if (event.type === "waiting") {
      answer.ahead = event.ahead;
      view.draw();
    } else if (event.type === "piece") {
      answer.text += event.text;
      if (answer.state === "running") view.grow(event.side);
      else { answer.state = "running"; view.draw(); }
    } else if (event.type === "answer") {
      const { text: whole, finished, tokens, score, forgotten, id } = event;
      Object.assign(answer, { state: "done", text: whole, finished, tokens, score, forgotten, id });
      view.draw();
      say(`Answer ${titleOf(exchange, event.side)} is complete`);
    } else if (event.type === "failed") {
      Object.assign(answer, { state: "failed", sentence: event.sentence });
      view.draw();
    } else if (event.type === "end") {
      exchange.key = event.key;
    }
  };
  try {
    report("");
    await ask(sent, heard, running.signal);
  } catch (error) {
    if (error.name === "AbortError") say("stopped");
    else report(error.message);
  } finally {
    running = null;
    if (exchange) {
      settle(exchange);
      view.draw();
    }
    refresh();
    find("text").focus({ preventScroll: true });
  }
}

// -- what people do -------------------------------------------------------------------------------

function listen() {
  find("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    const text = find("text").value.trim();
    if (running || !text) return;
    if (!chosen().length) {
      report("choose who answers, in the settings");
      return;
    }
    try {
      send(text, body(text));
    } catch (error) {
      report(error.message);
    }
  });
  find("text").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing && !window.matchMedia("(pointer: coarse)").matches) {
      event.preventDefault();
      find("ask").requestSubmit();
    }
  });
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") running?.abort(); });
  find("stop").addEventListener("click", () => running?.abort());
  find("new").addEventListener("click", () => { begin(); find("text").focus(); });
  find("options").addEventListener("submit", (event) => event.preventDefault());
  find("options").addEventListener("change", refresh);
  // whoever changes the switch begins a new conversation: what was said before keeps its promise
  find("consent").addEventListener("change", () => {
    if (exchanges.length) say("a new conversation has begun");
    begin();
  });
  find("delete").addEventListener("click", async () => {
    try {
      await post(`/api/conversations/${conversation}/delete`);
      kept -= 1;
      begin();
      say("deleted");
    } catch (error) {
      report(error.message);
    }
  });
  find("delete-all").addEventListener("click", async () => {
    if (!confirm(`${find("delete-all").textContent}? Nothing brings them back.`)) return;
    try {
      await post("/api/conversations/delete");
      kept = 0;
      begin();
      say("deleted");
    } catch (error) {
      report(error.message);
    }
  });
}

async function start() {
  try {
    setup = await get("/api/setup");
    kept = setup.kept;
  } catch (error) {
    find("empty").hidden = true;
    report(error.message);
    find("send").disabled = true;
    return;
  }
  if (location.search) history.replaceState(null, "", location.pathname); // the token opens the page: it stays in no address bar
  const talk = read(sessionStorage, "talk");
  fill();
  if (Array.isArray(talk.exchanges)) {
    for (const exchange of talk.exchanges) {
      settle(exchange);
      add(exchange);
    }
    conversation = talk.conversation ?? null;
    find("system").value = talk.system ?? "";
    find("kind").value = talk.kind ?? "";
  }
  listen();
  refresh();
}

start();
