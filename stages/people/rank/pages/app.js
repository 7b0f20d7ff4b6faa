// The page: who ranks, the next task, what is saved, what to do when the server is silent.

import { openAccount, openGuidelines, openHistory, openKeys } from "./dialogs.js";
import { startClock } from "./clock.js";
import { button, fill, make, say } from "./dom.js";
import { ask, askUntilAnswered, Refused } from "./net.js";
import { labelerOfThisBrowser, readGuidelines, signIn, storedKey } from "./signin.js";
import { showTask } from "./task.js";

const LOOK_AGAIN = 20_000; // ms between two looks for new tasks
const REST_AGAIN = 15 * 60_000; // ms until a break is proposed again
const main = document.getElementById("main");
const saved = document.getElementById("saved");
const banners = document.getElementById("banners");
const clock = startClock();
const keys = {
  on: () => localStorage.getItem("rlhf-rank-keys") !== "off",
  set: (on) => localStorage.setItem("rlhf-rank-keys", on ? "on" : "off"),
};
let task = null;
let guidelines = null;
let labeler = null;
let restAfter = 0;
let lookAgain = 0;

/** Show a banner, one a name; without a text it goes. */
function banner(name, text, ...more) {
  const old = document.getElementById(`banner-${name}`);
  if (!text) {
    old?.remove();
    return;
  }
  if (old?.dataset.text === text) return;
  const element = make("div", { id: `banner-${name}`, class: `banner ${name}`, role: name === "rest" ? "status" : "alert", "data-text": text },
    make("p", { text }), ...more);
  if (old) old.replaceWith(element);
  else banners.append(element);
}

/** Show whether everything is saved; n moves are not. */
function showState(state, unsaved = 0) {
  const text = { saved: "Saved", saving: "Saving …", waiting: `Not saved: ${unsaved}`, loading: "", silent: "No answer" }[state];
  saved.textContent = text;
  saved.className = `keeping ${state}`;
  const moves = unsaved === 1 ? "1 move is" : `${unsaved} moves are`;
  banner("silent", state === "waiting"
    ? `The server does not answer. ${moves} not saved yet: kept in this browser, and sent as soon as it is back. You can go on.`
    : state === "silent" ? "The server does not answer. Trying again …" : "");
}

const whileSilent = (waiting) => showState(waiting ? "silent" : "loading");

function showProgress(progress) {
  const element = document.getElementById("progress");
  if (!progress) return;
  const total = progress.done + (progress.left ?? 0);
  fill(element, make("span", { text: `Today ${progress.done_today} · all ${progress.done} · left ${progress.left ?? "?"}` }),
    total > 0 ? make("progress", { max: total, value: progress.done, "aria-label": "Share of your tasks that is done" }) : null);
  if (progress.break_due && Date.now() > restAfter) {
    banner("rest", "You have been at it for a while. A few minutes off keep judgments steady; everything is saved.",
      button("Go on", () => {
        restAfter = Date.now() + REST_AGAIN;
        banner("rest", "");
      }));
  } else if (!progress.break_due) banner("rest", "");
}

/** Say that the way on is to open the address again. */
function showClosed(error) {
  const text = error.body?.need === "token"
    ? "This page's session has ended. Open the address that the server printed once more; what is not sent yet waits in this browser."
    : error.message;
  banner("closed", text, button("Load again", () => location.reload()));
}

/** Handle a refusal: of the session, or of one move. */
async function onRefused(error) {
  if (error.body?.need === "labeler") {
    location.reload(); // the labeler's key is asked for again
    return;
  }
  if (error.status === 401 || error.status === 403) {
    showClosed(error);
    return;
  }
  banner("refused", `${error.message} The task is shown as the server has it.`, button("All right", () => banner("refused", "")));
  await next();
}

async function finish(path, body, saver) {
  await saver.flush();
  if (saver.waiting > 0) return; // the session has ended; a banner says so
  for (const element of main.querySelectorAll("button.submit")) element.disabled = true;
  showState("saving");
  const times = clock.read();
  try {
    await askUntilAnswered("POST", path, { ...body, seq: saver.seq, ...times }, whileSilent);
    clock.spend(times);
  } catch (error) {
    // after a silence a refusal may mean that the first try had arrived: the next task shows it
    if (!(error instanceof Refused) || error.status === 401) {
      showClosed(error);
      return;
    }
    if (!error.tries) {
      banner("refused", error.message, button("All right", () => banner("refused", "")));
      if (error.status !== 409) {
        for (const element of main.querySelectorAll("button.submit")) element.disabled = false;
        showState("saved");
        return;
      }
    }
  }
  await next();
  say("Saved. The next task.");
}

function showNothing() {
  const look = button("Look again", () => next(), { class: "main-action" });
  fill(main, make("section", { class: "panel" },
    make("h2", { tabIndex: -1, text: "Nothing to rank at the moment" }),
    make("p", { text: "Every task is done, or somebody else is at it. This page looks again by itself." }),
    make("div", { class: "row" }, look)));
  clearTimeout(lookAgain);
  lookAgain = setTimeout(() => next(false), LOOK_AGAIN);
}

/** Show what the server gives next. */
async function show(answer, moveFocus = true) {
  task?.close();
  task = null;
  clearTimeout(lookAgain);
  showProgress(answer.progress);
  showState("loading");
  if (!answer.assignment) {
    showNothing();
    return;
  }
  if (guidelines.digest !== answer.assignment.guidelines_digest && answer.assignment.guidelines_digest) {
    guidelines = await askUntilAnswered("GET", "/api/guidelines", undefined, whileSilent);
    await readGuidelines(main, guidelines);
  }
  const { id } = answer.assignment;
  task = showTask(main, answer.assignment, {
    clock,
    guidelines: guidelines.markdown,
    keysOn: keys.on,
    onState: showState,
    onRefused,
    onElsewhere: () => banner("elsewhere", "This task was changed in another window. Both windows' moves are shown here.",
      button("All right", () => banner("elsewhere", ""))),
    onSubmit: (saver) => finish(`/api/assignments/${id}/submit`, {}, saver),
    onSkip: (saver, reason) => finish(`/api/assignments/${id}/skip`, { reason }, saver),
  });
  if (moveFocus) {
    scrollTo(0, 0);
    main.focus({ preventScroll: true });
  }
}

async function next(moveFocus = true) {
  try {
    await show(await askUntilAnswered("GET", "/api/next", undefined, whileSilent), moveFocus);
  } catch (error) {
    showClosed(error);
  }
}

async function reopen(id) {
  if (task) await task.saver.flush();
  try {
    await show(await askUntilAnswered("POST", `/api/assignments/${id}/reopen`, {}, whileSilent));
  } catch (error) {
    banner("refused", error.message, button("All right", () => banner("refused", "")));
  }
}

function showMenu() {
  fill(document.getElementById("menu"),
    button("Guidelines", () => openGuidelines(guidelines.markdown)),
    button("Last ten", () => openHistory(reopen)),
    button("Keys", () => openKeys(keys), { class: "for-keys" }),
    button("Another browser", () => openAccount(labeler, storedKey())));
}

addEventListener("keydown", (event) => {
  if (document.querySelector("dialog[open]")) return;
  if (event.key === "?" && keys.on() && !document.activeElement.matches("textarea, input:not([type=radio])")) openKeys(keys);
  else if (!task || !task.key(event)) return;
  event.preventDefault();
});
addEventListener("beforeunload", (event) => {
  if (task && task.saver.waiting > 0) event.preventDefault();
});

async function begin() {
  // the token has become a cookie: keep it out of the address bar and out of screenshots
  if (location.search) history.replaceState(null, "", location.pathname);
  try {
    let found;
    for (let wait = 500; ; wait = Math.min(2 * wait, 5000)) {
      try {
        found = await labelerOfThisBrowser();
        break;
      } catch (error) {
        if (error instanceof Refused) throw error;
        showState("silent");
        await new Promise((resolve) => setTimeout(resolve, wait));
      }
    }
    showState("loading");
    labeler = found || (await signIn(main));
    guidelines = await ask("GET", "/api/guidelines");
    await readGuidelines(main, guidelines);
    showMenu();
    await next();
  } catch (error) {
    if (error instanceof Refused) showClosed(error);
    else {
      showState("silent");
      setTimeout(begin, 2000);
    }
  }
}

begin();
