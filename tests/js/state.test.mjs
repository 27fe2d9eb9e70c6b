// The reducer of explorers and what is keyed by it, without a browser: node --test tests/js
import assert from "node:assert/strict";
import { test } from "node:test";
import * as state from "../../book/lab/js/state.js";

const RULES = {
  defaults: { curve: "wsd", peak: 1, warmup: 0.1 },
  start: {},
  settle: (now) => ({ ...now, peak: Math.min(10, now.peak) }),
  keyOf: (now) => state.canonical(state.differing(now, { curve: "wsd", peak: 1, warmup: 0.1 })),
};
const KINDS = { curve: state.among(["wsd", "rsqrt"]), peak: state.within([0, 10]), warmup: state.within([0, 1]) };

// The model after actions, from the beginning.
const after = (...actions) => actions.reduce((model, action) => state.reduce(model, action, RULES), state.begin(RULES));
const freeze = (value) => (value && typeof value === "object" ? Object.freeze(Object.values(value).forEach(freeze) ?? value) : value);
const run = (warmup) => ({ ...RULES.defaults, warmup });

test("equal values have one canonical text, whatever the order of their keys", () => {
  assert.equal(state.canonical({ b: [1, { d: null, c: 2 }], a: "x" }), state.canonical({ a: "x", b: [1, { c: 2, d: null }] }));
  assert.notEqual(state.canonical({ a: 1 }), state.canonical({ a: "1" }));
  assert.equal(state.canonical({ a: undefined }), '{"a":null}');
});

test("no action changes the model that it is given", () => {
  const full = after({ change: { peak: 3 } }, { pin: run(0.2) }, { run: [run(0.2)] }, { guess: { key: "k", at: [1, 2] } });
  const actions = [
    { change: { peak: 4 } }, { begin: {} }, { reset: true }, { undo: true }, { pin: run(0.5) }, { unpin: full.pins[0].key },
    { size: "quick" }, { run: [run(0.3)] }, { told: [{ ...full.runs[0], words: "done" }] }, { cancel: full.runs[0] },
    { drop: full.runs[0] }, { guess: { key: "other", at: [1, 2] } },
  ];
  freeze(full);
  for (const action of actions) assert.doesNotThrow(() => state.reduce(full, action, RULES), JSON.stringify(action));
});

test("a preset starts from the defaults and leaves nothing of what was set before", () => {
  const model = after({ change: { warmup: 0.6 } }, { begin: { peak: 2 } });
  assert.deepEqual(model.state, { curve: "wsd", peak: 2, warmup: 0.1 });
});

test("reset goes to what the cell began with, and undo back over it", () => {
  const rules = { ...RULES, start: { peak: 5 } };
  const reset = [{ change: { warmup: 0.3 } }, { reset: true }].reduce((model, action) => state.reduce(model, action, rules), state.begin(rules));
  assert.deepEqual(reset.state, { curve: "wsd", peak: 5, warmup: 0.1 });
  assert.equal(state.reduce(reset, { undo: true }, rules).state.warmup, 0.3);
});

test("a drag is undone as one, two controls are undone one by one, and the first state is the end", () => {
  const dragged = after({ change: { peak: 2 } }, { change: { peak: 3 } }, { change: { peak: 4 } }, { change: { warmup: 0.2 } });
  const once = state.reduce(dragged, { undo: true }, RULES);
  assert.deepEqual([once.state.peak, once.state.warmup], [4, 0.1]);
  const twice = state.reduce(once, { undo: true }, RULES);
  assert.equal(twice.state.peak, 1);
  assert.equal(state.reduce(twice, { undo: true }, RULES).state, twice.state);
});

test("after a drag has ended, another one of the same control is undone alone", () => {
  const twice = after({ change: { peak: 2 } }, { change: { peak: 3 } }, { ended: true }, { change: { peak: 4 } });
  const once = state.reduce(twice, { undo: true }, RULES);
  assert.equal(once.state.peak, 3);
  assert.equal(state.reduce(once, { undo: true }, RULES).state.peak, 1);
});

test("settings that differ in one key are two pins, and one setting is one pin", () => {
  const model = after({ pin: run(0.1) }, { pin: run(0.6) }, { pin: run(0.6) });
  assert.equal(model.pins.length, 2);
  assert.notEqual(model.pins[0].key, model.pins[1].key);
  const many = after(...[1, 2, 3, 4, 5].map((n) => ({ pin: run(n / 10) })));
  assert.equal(many.pins.length, state.MOST_PINS);
});

test("a colour stays with its setting while others come and go", () => {
  const model = after({ pin: run(0.1) }, { pin: run(0.2) }, { run: [run(0.2), run(0.3)] });
  const [first, second] = model.pins.map((pin) => model.colours[pin.key]);
  const third = model.colours[model.runs[1].key];
  assert.equal(new Set([first, second, third]).size, 3);
  const later = state.reduce(model, { unpin: model.pins[0].key }, RULES);
  assert.equal(later.colours[model.pins[1].key], second);
  assert.ok(!(model.pins[0].key in later.colours));
  const unpinned = state.reduce(later, { unpin: later.pins[0].key }, RULES);
  assert.equal(unpinned.colours[model.pins[1].key], second, "its run still has it");
});

test("a setting is trained once, however often it is asked for, and again once its run is over", () => {
  const asked = after({ run: [run(0.2), run(0.2)] }, { run: [run(0.2)] });
  assert.equal(asked.runs.length, 1);
  assert.equal(after({ run: [run(0.2)] }, { size: "quick" }, { run: [run(0.2)] }).runs.length, 2);
  const over = state.reduce(asked, { told: [{ ...asked.runs[0], over: true, done: true, words: "done" }] }, RULES);
  const again = state.reduce(over, { run: [run(0.2)] }, RULES);
  assert.deepEqual(again.runs.map((each) => [each.words, each.over]), [["asked", undefined]]);
});

test("what the kernel tells is told of the run that it names, and cancelled runs stay so", () => {
  const asked = after({ run: [run(0.2), run(0.3)] });
  const [one, other] = asked.runs;
  const told = state.reduce(asked, { told: [{ size: one.size, key: other.key, words: "step 3", trail: [[1, 2]] }] }, RULES);
  assert.deepEqual(told.runs.map((each) => each.words), ["asked", "step 3"]);
  const cancelled = state.reduce(told, { cancel: one }, RULES);
  const late = state.reduce(cancelled, { told: [{ ...one, words: "starting" }] }, RULES);
  assert.equal(late.runs[0].words, "cancelled");
  assert.equal(state.reduce(late, { drop: one }, RULES).runs.length, 1);
});

test("a run that the kernel has forgotten goes, and one of which it has not heard stays", () => {
  const [one, other] = after({ run: [run(0.2), run(0.3)] }).runs;
  const asked = { run: [run(0.2), run(0.3)] };
  const heard = { told: [{ ...one, heard: true, words: "done", over: true }] };
  const late = after(asked, heard, { drop: one }, heard); // what was told before the kernel heard of the drop
  assert.equal(late.runs.length, 2);
  assert.deepEqual(state.reduce(late, { told: [] }, RULES).runs.map(({ key }) => key), [other.key]);
});

test("runs of which this page knows nothing are shown, as after it was opened again", () => {
  const told = [{ size: "quick", key: "{}", label: "wsd", words: "done", trail: [[1, 2]], done: true, over: true }];
  const model = after({ told });
  assert.deepEqual(model.runs, told);
  assert.ok(model.colours["{}"]);
});

test("what is kept begins the same model again", () => {
  const model = after({ change: { peak: 3 } }, { pin: run(0.6) }, { size: "quick" }, { guess: { key: "{}", at: [1, 2] } });
  const again = state.begin(RULES, JSON.parse(JSON.stringify(state.kept(model, RULES))));
  for (const key of ["state", "pins", "size", "guesses", "colours"]) assert.deepEqual(again[key], model[key], key);
});

test("a guess counts once", () => {
  assert.deepEqual(after({ guess: { key: "k", at: [1, 2] } }, { guess: { key: "k", at: [3, 4] } }).guesses, { k: [1, 2] });
});

test("reset takes the pins away", () => {
  assert.deepEqual(after({ change: { peak: 3 } }, { pin: run(0.6) }, { reset: true }).pins, []);
});

test("a link holds the pins, and what it shows cannot be undone", () => {
  const pins = [{ warmup: 0.6 }, {}];
  const link = state.linkTo("https://a.b/c", "schedule", { peak: 3 }, pins);
  const [found, warning, kept] = state.linked(link, "schedule", KINDS);
  assert.deepEqual([found, warning, kept], [{ peak: 3 }, "", pins]);
  const model = state.begin(RULES, { state: found, pins: kept });
  assert.deepEqual(model.pins.map((pin) => pin.state.warmup), [0.6, 0.1]);
  assert.equal(state.reduce(model, { undo: true }, RULES).state, model.state);
  const [, wrong] = state.linked("#explorer=schedule&pins=[{\"curve\":\"sine\"}]", "schedule", KINDS);
  assert.match(wrong, /This link cannot be read/);
});

test("a link leads back to its state, and the defaults have a short one", () => {
  const link = state.linkTo("https://a.b/c#old", "schedule", { warmup: 0.6, curve: "rsqrt" });
  assert.deepEqual(state.linked(link, "schedule", KINDS), [{ curve: "rsqrt", warmup: 0.6 }, "", []]);
  assert.equal(state.linkTo("https://a.b/c", "schedule", {}), "https://a.b/c#explorer=schedule");
  assert.equal(state.linked(link, "mixture", KINDS), null);
  assert.equal(state.linked("https://a.b/c#somewhere", "schedule", KINDS), null);
});

test("a link with a key that no link has, or with more pins than are shown, is refused", () => {
  const pins = encodeURIComponent(JSON.stringify(Array.from({ length: state.MOST_PINS + 1 }, (_, n) => ({ warmup: n / 10 }))));
  for (const words of ["stat={}", `pins=${pins}`]) {
    const [found, warning, kept] = state.linked(`#explorer=schedule&${words}`, "schedule", KINDS);
    assert.deepEqual([found, kept], [{}, []]);
    assert.match(warning, /This link cannot be read/);
  }
});

for (const [words, hash] of Object.entries({
  "cut off": '{"peak":1', "of another kind": "[1]", null: "null", "a number": "3", "out of range": '{"warmup":1.01}',
  "nested deeply": `{"curve":${"[".repeat(20_000)}${"]".repeat(20_000)}}`, "a text": '{"peak":"2"}', "an unknown key": '{"nothing":1}', "a key of objects": '{"toString":1}', "no option": '{"curve":"sine"}',
}))
  test(`a link that is ${words} says so and shows the defaults`, () => {
    const [found, warning] = state.linked(`#explorer=schedule&state=${encodeURIComponent(hash)}`, "schedule", KINDS);
    assert.deepEqual(found, {});
    assert.match(warning, /This link cannot be read, so you see the defaults: ./);
  });

test("a link does not write on the page", () => {
  const evil = `\u202e${"call us. ".repeat(99)}`;
  for (const words of [{ state: JSON.stringify({ [evil]: 1 }) }, { state: JSON.stringify({ curve: evil }) }, { [evil]: 1 }]) {
    const address = `#${new URLSearchParams({ explorer: "schedule", ...words })}`;
    const [, warning] = state.linked(address, "schedule", KINDS);
    assert.ok(warning.includes("call us.") && warning.length < 200 && !warning.includes("\u202e"));
  }
});

test("shares are three and sum to one", () => {
  for (const good of [[1 / 3, 1 / 3, 1 / 3], [0, 1, 0]]) assert.ok(state.shares(good));
  for (const bad of [[0.5, 0.5], [0.5, 0.5, 0.01], [1.2, -0.2, 0], "101", [Number.NaN, 0.5, 0.5], null]) assert.ok(!state.shares(bad));
});
