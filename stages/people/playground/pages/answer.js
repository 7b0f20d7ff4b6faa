// Show an exchange: a question, its answers side by side, and what can be said of them.

import { make, say } from "./dom.js";
import { post } from "./talk.js";
import { appendText, textBlock } from "./text.js";

const LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ";

// An answer: {state: waiting|running|done|failed, text, name, score, tokens, finished, id, up, correction, ...}
export function newAnswer(name) {
  return { state: "waiting", ahead: 0, text: "", name, score: null, id: null, up: null, correction: "" };
}

export const titleOf = (exchange, side) => {
  const answer = exchange.answers[side];
  const letter = exchange.answers.length > 1 ? LETTERS[side] : "";
  return answer.name === null ? letter : [letter, answer.name].filter(Boolean).join(" · ");
};

export const goesOn = (answer) => answer.state === "done" && Boolean((answer.correction || answer.text).trim());

function foot(answer) {
  if (answer.state === "waiting") return answer.ahead ? `waits for ${answer.ahead} other answers` : "waits";
  if (answer.state === "failed") return "";
  if (answer.state === "running") return "";
  const parts = [answer.tokens === 1 ? "1 token" : `${answer.tokens} tokens`];
  if (!answer.finished) parts.push("cut off: give it more tokens");
  if (answer.forgotten) parts.push(`the context was full: ${answer.forgotten} oldest questions were left out`);
  return parts.join(" · ");
}

// Return the element of an exchange, which draws itself again when something in it has changed.
export function show(exchange, changed, report) {
  const element = make("section", { class: "exchange", "aria-label": `Question ${exchange.number}` });

  const tell = async (work) => {
    try {
      await work();
      report("");
    } catch (error) {
      report(error.message);
    }
    changed();
    draw();
  };

  function words(answer, title) {
    if (answer.state === "failed") return make("p", { class: "problem" }, answer.sentence);
    const place = make("div", { class: "words" });
    if (answer.state === "done") place.append(textBlock(answer.text, `answer ${title}`));
    else appendText(place, answer.text);
    return place;
  }

  function thumbs(answer, title) {
    const button = (up, word) =>
      make("button", {
        type: "button", "aria-pressed": String(answer.up === up), "aria-label": `${word} answer ${title}`,
        onclick: () => tell(async () => {
          const wanted = answer.up === up ? null : up;
          await post(`/api/answers/${answer.id}/thumb`, { up: wanted });
          answer.up = wanted;
          say(wanted === null ? "thumb taken back" : "saved");
        }),
      }, word);
    return [button(true, "Good"), button(false, "Bad")];
  }

  function correction(answer, title) {
    if (!answer.editing) return [];
    const area = make("textarea", { "aria-label": `What answer ${title} should have been` });
    area.value = answer.correction || answer.text;
    const save = (text) => tell(async () => {
      await post(`/api/answers/${answer.id}/correction`, { text });
      answer.correction = text.trim();
      answer.editing = false;
      say("correction saved");
    });
    return [
      area,
      make("div", { class: "row" },
        make("button", { type: "button", class: "main-action", onclick: () => save(area.value) }, "Save correction"),
        answer.correction ? make("button", { type: "button", onclick: () => save("") }, "Take it back") : null,
        make("button", { type: "button", class: "quiet", onclick: () => { answer.editing = false; draw(); } }, "Cancel")),
    ];
  }

  function card(answer, side) {
    const title = titleOf(exchange, side);
    const chosen = exchange.answers.length > 1 && exchange.goOn === side;
    const corrected = exchange.goOn === side ? "your correction; the conversation goes on with it" : "your correction";
    const score = answer.score === null ? null : make("span", { class: "score", title: "the reward model’s score" }, `score ${answer.score.toFixed(2)}`);
    const actions = make("div", { class: "row" });
    if (answer.state === "done" && answer.id !== null) {
      actions.append(...thumbs(answer, title));
      if (!answer.editing) {
        actions.append(make("button", {
          type: "button", "aria-label": `Correct answer ${title}`,
          onclick: () => { answer.editing = true; draw(); element.querySelector("textarea").focus(); },
        }, answer.correction ? "Change the correction" : "Correct"));
      }
    }
    if (exchange.isLast && exchange.answers.length > 1 && goesOn(answer)) {
      actions.append(make("button", {
        type: "button", "aria-pressed": String(chosen), "aria-label": `Go on with answer ${title}`,
        onclick: () => { exchange.goOn = side; changed(); draw(); },
      }, "Go on with this"));
    }
    return make("article", {
      class: chosen ? "answer goes-on" : "answer", "aria-busy": String(answer.state === "running"),
      "aria-label": title ? `Answer ${title}` : "Answer",
    },
    make("header", {}, make("h2", {}, title || "Answer"), score),
    words(answer, title),
    answer.correction && !answer.editing
      ? make("div", { class: "corrected" }, make("p", { class: "soft" }, corrected), make("div", { class: "words" }, textBlock(answer.correction, "the correction")))
      : null,
    ...correction(answer, title),
    make("p", { class: "soft" }, foot(answer)),
    actions.childNodes.length ? actions : null);
  }

  const choose = (tiers) => tell(async () => {
    const named = tiers.map((tier) => tier.map((side) => exchange.answers[side].id));
    const found = await post("/api/choices", { conversation: exchange.conversation, seq: exchange.seq, tiers: named });
    reveal(exchange, found.answers);
    exchange.tiers = tiers;
    if (tiers[0].length === 1) [exchange.goOn] = tiers[0];
    say("saved");
  });

  const isTier = (tiers) => JSON.stringify(exchange.tiers) === JSON.stringify(tiers);

  function two() {
    const button = (tiers, text) => make("button", { type: "button", "aria-pressed": String(isTier(tiers)), onclick: () => choose(tiers) }, text);
    return [button([[0], [1]], "A is better"), button([[0, 1]], "Equally good"), button([[1], [0]], "B is better")];
  }

  function several() {
    const count = exchange.answers.length;
    const places = exchange.answers.map((_, side) => {
      const now = (exchange.tiers ?? []).findIndex((tier) => tier.includes(side));
      const select = make("select", { "aria-label": `Place of answer ${LETTERS[side]}` });
      for (let place = 0; place < count; place += 1) {
        select.append(make("option", { value: String(place), selected: place === Math.max(now, 0) }, `${place + 1}.`));
      }
      return select;
    });
    const save = () => {
      const tiers = Array.from({ length: count }, () => []);
      places.forEach((select, side) => tiers[Number(select.value)].push(side));
      return choose(tiers.filter((tier) => tier.length));
    };
    const labels = places.map((select, side) => make("label", { class: "row" }, LETTERS[side], select));
    return [...labels, make("button", { type: "button", onclick: save }, exchange.tiers ? "Save again" : "Save the order")];
  }

  function better() {
    const whole = exchange.answers.every((answer) => answer.state === "done");
    if (exchange.answers.length < 2 || !whole) return null;
    if (exchange.key) {
      const look = () => tell(async () => {
        reveal(exchange, (await post("/api/reveal", { key: exchange.key })).answers);
        exchange.key = null;
      });
      return make("div", { class: "better" }, make("button", { type: "button", onclick: look }, "Show the names"));
    }
    if (exchange.answers[0].id === null) return null;
    const choices = exchange.answers.length === 2 ? two() : several();
    const legend = exchange.answers.length === 2 ? "Which is better?" : "Which is better? Equal places are a tie.";
    return make("fieldset", { class: "better" }, make("legend", {}, legend), make("div", { class: "row" }, ...choices));
  }

  function draw() {
    const cards = exchange.answers.map(card);
    const last = better();
    element.replaceChildren(
      make("div", { class: "question" }, make("div", { class: "words" }, textBlock(exchange.text, "the question"))),
      make("div", { class: "answers" }, ...cards), ...(last ? [last] : []));
  }

  // A piece of text is added without drawing everything again.
  function grow(side) {
    const place = element.querySelectorAll(".answer")[side]?.querySelector(".words");
    if (!place) return;
    place.replaceChildren();
    appendText(place, exchange.answers[side].text);
  }

  draw();
  return { element, draw, grow };
}

function reveal(exchange, answers) {
  answers.forEach((found, side) => {
    exchange.answers[side].name = found.model;
    exchange.answers[side].score = found.score;
  });
}
