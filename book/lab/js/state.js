// The state of an explorer as plain data, and the one function that changes it. Nothing here touches a
// page, so the tests run it without a browser.

// JSON with sorted keys: equal values have equal texts, whatever order their keys were written in.
export function canonical(value) {
  if (Array.isArray(value)) return `[${value.map(canonical).join()}]`;
  if (value === null || typeof value !== "object") return JSON.stringify(value) ?? "null";
  const keys = Object.keys(value).sort();
  return `{${keys.map((key) => `${JSON.stringify(key)}:${canonical(value[key])}`).join()}}`;
}

export const same = (one, other) => canonical(one) === canonical(other);

// The keys of a state whose values differ from those of another, with these values.
export const differing = (state, usual) =>
  Object.fromEntries(Object.entries(usual).flatMap(([key]) => (same(state[key], usual[key]) ? [] : [[key, state[key]]])));

// What the value of a key may be, as functions from a value to whether it may be that.
const isNumber = (value) => typeof value === "number" && Number.isFinite(value);
export const among = (values) => (value) => values.some((each) => same(each, value));
export const within = ([low, high]) => (value) => isNumber(value) && value >= low && value <= high;
export const flag = (value) => typeof value === "boolean";
export const shares = (value) =>
  Array.isArray(value) && value.length === 3 && value.every(within([0, 1])) && Math.abs(value[0] + value[1] + value[2] - 1) < 1e-6;
export const listOf = (kind) => (value) => Array.isArray(value) && value.every(kind);
export const optional = (kind) => (value) => value === null || kind(value);

// A text of a link as a page may repeat it: not too long, and without characters that reverse other text.
const LONGEST = 60;
export function quoted(text) {
  const plain = text.replace(/[\u202a-\u202e\u2066-\u2069]/g, "");
  return plain.length > LONGEST ? `${plain.slice(0, LONGEST - 1)}…` : plain;
}

// Of a state that somebody wrote by hand or got in a link, what can be shown, and what is wrong with the
// rest in words. One wrong key spoils all of it: a half of a setting would be another setting.
export function accepted(given, kinds) {
  if (given === null || typeof given !== "object" || Array.isArray(given)) return [{}, "it is no list of settings"];
  for (const [key, value] of Object.entries(given)) {
    if (!Object.hasOwn(kinds, key)) return [{}, `it sets “${quoted(key)}”, which this explorer does not have`];
    if (!kinds[key](value)) return [{}, `${key} cannot be ${quoted(JSON.stringify(value))}`];
  }
  return [given, ""];
}

// The address of an explorer in a state, with its pins. Only what differs from the defaults is in it.
export function linkTo(page, name, changes, pins = []) {
  const words = new URLSearchParams({ explorer: name });
  if (Object.keys(changes).length) words.set("state", canonical(changes));
  if (pins.length) words.set("pins", canonical(pins));
  return `${page.split("#")[0]}#${words}`;
}

// What an address says of the explorer `name`: null where it speaks of none or of another one, else its
// state, what is wrong with the link in words, and its pins.
export function linked(address, name, kinds) {
  const words = new URLSearchParams(address.split("#")[1] ?? "");
  if (words.get("explorer") !== name) return null;
  const wrong = (why) => [{}, `This link cannot be read, so you see the defaults: ${why}.`, []];
  const odd = [...words.keys()].find((key) => !["explorer", "state", "pins"].includes(key));
  if (odd) return wrong(`it has “${quoted(odd)}”, which no link has`);
  try {
    const [given, pins] = ["state", "pins"].map((key, n) => JSON.parse(words.get(key) ?? ["{}", "[]"][n]));
    if (!Array.isArray(pins)) return wrong("its pins are no list");
    if (pins.length > MOST_PINS) return wrong(`it has ${pins.length} pins, and at most ${MOST_PINS} can be shown`);
    const faults = [given, ...pins].map((each) => accepted(each, kinds)[1]).filter(Boolean);
    return faults.length ? wrong(faults[0]) : [given, "", pins];
  } catch {
    return wrong("a part of it is missing, or nested too deeply");
  }
}

// The last two are the colours of what is stored and predicted.
export const COLOURS = ["#029e73", "#cc78bc", "#8f7a1e", "#d1477a", "#6b8fd6", "#ca6b2f", "#0173b2", "#de8f05"];
export const MOST_PINS = 4;
const MOST_UNDONE = 100;

// `rules` of an explorer: `defaults`; `start`, what its cell changes in them; `settle(state, changes)`,
// which makes a state possible; `keyOf(state)`, by which pins, runs and colours are known. The rest is
// what a page kept of an earlier model, or a link says of the state.
export function begin(rules, { state, pins = [], size = "cpu", guesses = {} } = {}) {
  const settled = (changes) => rules.settle({ ...rules.defaults, ...changes }, {});
  const lists = { past: [], touched: "", pins: [], runs: [], colours: {} };
  const model = { state: settled(state ?? rules.start), size, guesses, ...lists };
  return pins.reduce((made, changes) => reduce(made, { pin: settled(changes) }, rules), model);
}

// What a page keeps of a model: of each state, what differs from the defaults.
export const kept = ({ state, pins, size, guesses }, { defaults }) => ({
  state: differing(state, defaults),
  pins: pins.map((pin) => differing(pin.state, defaults)),
  size,
  guesses,
});

// The model after an action, which is one of
//   {change}: some keys of the state, which are undone as one until {ended}; {begin}: the defaults with some
//   changes; {reset}, which takes the pins away, too; {undo};
//   {pin}: a state; {unpin}: a key; {size}: of runs;
//   {run}: states, each asked for once while it goes on; {told}: runs as the kernel has them; {cancel} and
//   {drop}: a run; {guess}: {key, at}, where the reader expects a setting to end, which counts once.
export function reduce(model, action, rules) {
  const [kind] = Object.keys(action);
  const next = { ...model, ...ACTIONS[kind](model, action[kind], rules) };
  return { ...next, colours: coloured(next) };
}

const settings = (model, state, touched) => {
  if (same(state, model.state)) return {};
  const goesOn = touched === model.touched;
  const past = goesOn ? model.past : [...model.past, model.state].slice(-MOST_UNDONE);
  return { state, past, touched };
};

const ACTIONS = {
  change: (model, changes, rules) =>
    settings(model, rules.settle({ ...model.state, ...changes }, changes), Object.keys(changes).sort().join()),
  ended: () => ({ touched: "" }),
  begin: (model, changes, rules) =>
    settings(model, rules.settle({ ...rules.defaults, ...changes }, {}), `begin ${canonical(changes)}`),
  reset: (model, _, rules) => ({
    ...settings(model, rules.settle({ ...rules.defaults, ...rules.start }, {}), "reset"),
    pins: [],
  }),
  undo: ({ past }) => (past.length ? { state: past.at(-1), past: past.slice(0, -1), touched: "" } : {}),
  pin(model, state, rules) {
    const key = rules.keyOf(state);
    const pinned = model.pins.length < MOST_PINS && !model.pins.some((pin) => pin.key === key);
    return pinned ? { pins: [...model.pins, { key, state }] } : {};
  },
  unpin: ({ pins }, key) => ({ pins: pins.filter((pin) => pin.key !== key) }),
  size: (_, size) => ({ size }),
  run(model, states, rules) {
    const asked = states.map((state) => ({ key: rules.keyOf(state), size: model.size, state }));
    const goesOn = (run) => model.runs.some((each) => !each.over && isRun(each, run));
    const fresh = asked.filter((run, n) => !goesOn(run) && n === asked.findIndex((each) => isRun(each, run)));
    const others = model.runs.filter((each) => !fresh.some((run) => isRun(each, run)));
    return { runs: [...others, ...fresh.map((run) => ({ ...run, words: "asked", progress: 0, trail: [] }))] };
  },
  // The kernel tells of all its runs. What it knows of one stands over what was asked; a run of which it has not
  // heard stays as it is, and one that it has forgotten goes.
  told(model, told) {
    const known = (run) => told.find((each) => isRun(each, run));
    const left = model.runs.filter((run) => !run.heard || known(run));
    const runs = left.map((run) => (run.cancelled ? run : { ...run, ...known(run) }));
    return { runs: [...runs, ...told.filter((each) => !model.runs.some((run) => isRun(each, run)))] };
  },
  cancel: ({ runs }, chosen) => {
    const end = { words: "cancelled", cancelled: true, over: true };
    return { runs: runs.map((run) => (isRun(run, chosen) ? { ...run, ...end } : run)) };
  },
  drop: ({ runs }, chosen) => ({ runs: runs.filter((run) => !isRun(run, chosen)) }),
  guess: ({ guesses }, { key, at }) => (key in guesses ? {} : { guesses: { ...guesses, [key]: at } }),
};

// A run is known by its size and its setting.
const isRun = (one, other) => one.key === other.key && one.size === other.size;

// Each pinned or run setting has a colour of its own, which it keeps for as long as it is either.
function coloured({ pins, runs, colours }) {
  const keys = new Set([...pins, ...runs].map((each) => each.key));
  const kept = Object.entries(colours).filter(([key]) => keys.has(key));
  const made = new Map(kept);
  for (const key of keys) {
    const used = new Set(made.values());
    if (!made.has(key)) made.set(key, COLOURS.find((each) => !used.has(each)) ?? "#8c8c8c");
  }
  return Object.fromEntries(made);
}
