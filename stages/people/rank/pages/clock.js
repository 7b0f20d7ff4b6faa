// Count the seconds that a person works on a task. Left out: a hidden page, and rests.

const IDLE_AFTER = 60_000; // ms without a key, a touch, a movement or a scroll
const LONGEST = 24 * 3600_000; // ms of rest that are counted; the server takes no more at a time
const STEP = 500; // ms between two looks at the clock
const MOVES = ["pointerdown", "pointermove", "keydown", "wheel", "touchstart", "scroll", "input"];

/**
 * Start a clock.
 * @returns {{read: () => {active_ms: number, idle_ms: number}, spend: (times: object) => void}}
 *   `read` gives what has gathered since the last `spend`, which takes what the server has got
 */
export function startClock() {
  let lastSign = performance.now();
  let lastLook = lastSign;
  const gathered = { active_ms: 0, idle_ms: 0 };
  const look = () => {
    const now = performance.now();
    const passed = now - lastLook;
    lastLook = now;
    // a long gap between two looks: the machine slept
    const active = !document.hidden && now - lastSign < IDLE_AFTER && passed < 10 * STEP;
    const kind = active ? "active_ms" : "idle_ms";
    gathered[kind] = Math.min(gathered[kind] + passed, LONGEST);
  };
  for (const name of MOVES) {
    addEventListener(name, () => {
      lastSign = performance.now();
    }, { passive: true, capture: true });
  }
  document.addEventListener("visibilitychange", look);
  setInterval(look, STEP);
  return {
    read() {
      look();
      return { active_ms: Math.round(gathered.active_ms), idle_ms: Math.round(gathered.idle_ms) };
    },
    spend(times) {
      gathered.active_ms -= times.active_ms;
      gathered.idle_ms -= times.idle_ms;
    },
  };
}
