// The frame of every explorer, and the bench of those whose states are settings of runs.
import { FORMS, keywords, takeAway } from "./export.js";
import { atRest, button, element, form, perFrame, places, points, say, score, table, toolbar } from "./form.js";
import { comparison, isHeld, plane } from "./plane.js";
import { runRows, watch } from "./runs.js";
import { accepted, begin, canonical, differing, kept, linked, linkTo, reduce, same } from "./state.js";

// What every explorer has: one model that only the reducer changes, buttons that begin from presets, undo
// and reset, and its place in the address, or in a notebook in the kernel, which outlives the page.
// `draw(everything)` shows the model: all of it, or what moves with a pointer.
export function frame(el, { name, rules, kinds, kernel, start = {}, presets = [], place, draw }) {
  const [given, fault] = accepted(start, kinds);
  rules = { ...rules, start: given };
  const words = { warned: fault && `The cell’s settings cannot be shown, so you see the defaults: ${fault}.` };
  const read = () => (kernel ? null : linked(location.href, name, kinds));
  const saved = kernel?.saved();
  let model = begin(rules, saved?.state ? saved : {});
  const follow = atRest(() => {
    if (kernel) return kernel.save(kept(model, rules));
    history.replaceState(null, "", address());
  }, 250);
  const light = perFrame(() => draw(false));
  const rest = atRest(() => (isHeld() ? rest() : draw(true)));
  const whole = perFrame(() => draw(true));
  const address = () => linkTo(location.href, name, differing(model.state, rules.defaults));

  const bench = {
    rules,
    address,
    get model() {
      return model;
    },
    act(action) {
      model = reduce(model, action, rules);
      bench.warn("");
      if ("told" in action) return whole();
      "change" in action ? (light(), rest()) : whole();
      follow();
    },
    warn(text) {
      if (place.warned.textContent !== text) place.warned.textContent = text;
    },
    // Presets, and the way back.
    buttons() {
      const made = presets.map(({ label, state }) => button(label, () => bench.act({ begin: state })));
      const undo = button("Undo", () => bench.act({ undo: true }), { class: "undo" });
      const reset = button("Reset", () => bench.act({ reset: true }));
      return toolbar("Begin from", ...(made.length ? [element("span", {}, "Begin from"), ...made] : []), undo, reset);
    },
    // Called at the end of each whole drawing.
    drawn() {
      if (!place.presets.isConnected) return;
      place.presets.querySelector(".undo").toggleAttribute("disabled", !model.past.length);
    },
  };
  function land() {
    const found = read();
    if (!found) return false;
    const [state, wrong] = found;
    model = reduce(model, { begin: state }, rules);
    const changed = Object.keys(state).filter((key) => !same(model.state[key], state[key]));
    const together = changed.length ? `This link’s settings do not go together: ${changed.join(", ")} changed.` : "";
    bench.warn(wrong || together);
    whole();
    el.scrollIntoView({ block: "start" });
    return true;
  }
  place.presets.append(bench.buttons());
  bench.warn(words.warned);
  new ResizeObserver(whole).observe(el);
  if (!kernel) addEventListener("hashchange", land);
  return Object.assign(bench, {
    begin() {
      draw(true);
      el.dataset.ready = "";
      if (read()) requestAnimationFrame(land); // once the explorers above have their heights
    },
  });
}

// A bench for settings of runs. The explorer gives `fields(state)`, `picture(place, state, change, pins)`,
// `describe(state)` -> {label, sentence, changes, parameters, lacks, predicted}, `settle(state, changes)`,
// which makes a state possible, and `kinds`, what each key may be.
export function workbench(el, { table: data, kernel, start, name, model: about, picture, hint, actions = [] }) {
  const { fields, describe, settle, kinds } = about;
  const place = places(el, ["presets", "controls", "picture", "plane", "said", "warned", "guesses", "runs", "pins", "away"]);
  const drawn = element("div", {}, place.picture, element("p", { class: "key" }, hint));
  const sides = element("div", { class: "sides" }, drawn, place.plane);
  el.append(place.presets, place.controls, sides, place.said, place.warned, place.guesses, place.runs, place.pins, place.away);
  const rules = { defaults: data.defaults, settle, keyOf: (state) => canonical(describe(state).changes) };
  const { guess: guesses = false, ...given } = start ?? {};
  const bench = frame(el, { name, rules, kinds, kernel, start: given, presets: data.presets, place, draw });
  const { act } = bench;
  const stored = new Map(data.runs.map((run) => [canonical(run.changes), run]));
  const change = (changes) => act({ change: changes });
  let seen = null; // a stored setting that the pointer is over
  let guessing = guesses ? middle() : null;
  const shownState = () => (seen ? settle({ ...data.defaults, ...seen.state }, {}) : bench.model.state);

  function middle() {
    const [x, y] = [0, 1].map((k) => data.runs.map((run) => run.at[k]).sort((a, b) => a - b));
    return [x, y].map((values) => values[values.length >> 1]);
  }
  const drawForm = form(place.controls, change, bench.warn);
  const drawPlane = plane(place.plane, {
    preview(run) {
      if (seen === run) return;
      seen = run;
      requestAnimationFrame(() => draw(false));
    },
    choose: (run) => ((seen = null), act({ begin: run.state })),
    pick: (at) => ((guessing = at), requestAnimationFrame(() => draw(false))),
  });
  const away = takeAway(place.away, Object.keys(FORMS), () => {
    const { state, size } = bench.model;
    const link = kernel ? `explorers.${name}_explorer(${keywords(differing(state, data.defaults))})` : bench.address();
    return { profile: size, profiles: data.profiles, ...describe(state), chapter: data.chapter, link };
  });

  // runs
  const live = () => bench.model.runs.some((run) => !run.over);
  const watched = watch(kernel, live, () => draw(true));
  const tell = (verb, { size, key }, more = {}) => kernel.send({ verb, size, key, ...more });
  function launch(states) {
    const before = bench.model.runs;
    act({ run: states });
    for (const run of bench.model.runs.filter((each) => !before.includes(each))) {
      const { label, changes } = describe(run.state);
      tell("run", run, { label, changes });
    }
    watched.begin();
  }
  kernel?.onRuns((told) => {
    act({ told });
    if (live()) watched.begin();
  });
  kernel?.gone(() => bench.warn("The kernel is gone: run the cell again to train runs."));
  const drawRows = runRows(element("div", { class: "list" }), {
    stop(run) {
      tell("stop", run);
      if (!run.heard) act({ cancel: run });
    },
    drop(run) {
      tell("forget", run);
      act({ drop: run });
    },
  });
  const pinned = (n) => bench.model.pins.slice(0, n).map((pin) => pin.state);
  const sizes = element(
    "select",
    { "aria-label": "Size of a run", oninput: () => act({ size: sizes.value }) },
    ...Object.entries(data.sizes).map(([key, words]) => element("option", { value: key }, words)),
  );
  const buttons = toolbar(
    "Runs and pins",
    kernel && sizes,
    kernel && button("Run this", () => launch([bench.model.state]), { class: "go" }),
    kernel && button("Run the first two pins", () => launch(pinned(2)), { class: "both" }),
    button("Pin to compare", () => act({ pin: bench.model.state })),
    ...actions.map(({ label, to }) => button(label, () => compare(to), { class: "act" })),
    button("Guess where it ends", () => toggleGuess(), { class: "asks", "aria-pressed": "false" }),
  );
  place.runs.append(buttons, drawRows.place);
  function compare(to) {
    act({ pin: bench.model.state });
    act({ change: to(bench.model.state) });
    act({ pin: bench.model.state });
  }

  // guesses
  function toggleGuess() {
    guessing = guessing ? null : middle();
    draw(true);
  }
  const ended = (key, shown) => stored.get(key) ?? shown.predicted;
  function reveal(key) {
    act({ guess: { key, at: guessing } });
  }
  const miss = (one, other) => Math.hypot(one[0] - other[0], one[1] - other[1]);
  function drawGuess(key, end) {
    const own = bench.model.guesses[key];
    const open = guessing && end && !own;
    const words = !guessing
      ? ""
      : !end
        ? "No stored run is near this setting, so a guess could not be checked."
        : own
          ? guessWords(own, end)
          : "Where will this setting end? Drag the ring, or click in the plane.";
    if (place.guesses.dataset.words === words) return;
    place.guesses.dataset.words = words;
    const said = element("span", { "aria-live": "polite" }, words);
    place.guesses.replaceChildren(...(words ? [said] : []), ...(open ? [button("Reveal", () => reveal(key), { class: "go" })] : []));
  }
  function guessWords(own, end) {
    const all = Object.entries(bench.model.guesses).map(([key, at]) => [at, stored.get(key)?.at]);
    const known = all.filter(([, at]) => at).map(([at, to]) => miss(at, to));
    const mean = known.reduce((sum, each) => sum + each, 0) / known.length;
    const past = known.length > 1 ? ` Your ${known.length} guesses at stored settings miss by ${points(mean)} points on average.` : "";
    return `You guessed A_KA ${points(own[0])}, A_ZS ${points(own[1])}. It ended ${points(miss(own, end.at))} points away, at A_KA ${points(end.at[0])}, A_ZS ${points(end.at[1])}.${past}`;
  }

  function drawPins(colours) {
    const { pins, runs, size } = bench.model;
    const own = (key) => runs.find((run) => run.key === key && run.done && run.size === size)?.trail.at(-1);
    const rows = pins.map(({ key, state }) => {
      const shown = describe(state);
      const known = ended(key, shown);
      const scored = (axis) => (known ? score(known, axis) : "–");
      const mine = own(key);
      const look = { class: "name", style: `border-color:${colours[key]}` };
      return [
        button(shown.label, () => act({ begin: differing(state, data.defaults) }), look),
        scored(0),
        scored(1),
        stored.has(key) ? "stored" : known ? "predicted" : "nothing near",
        mine ? mine.map(points).join(", ") : "–",
        button("Unpin", () => act({ unpin: key })),
      ];
    });
    const between = element("div");
    const head = ["pinned", "A_KA", "A_ZS", "from", `your run (${size})`, ""];
    place.pins.replaceChildren(...(rows.length ? [table(head, rows), between] : []));
    if (pins.length < 2) return;
    const [one, other] = pins.map(({ key, state }) => ({
      ...(size === "cpu" ? stored.get(key) : {}),
      label: describe(state).label,
      own: own(key),
    }));
    comparison(between, one, other, data);
    const words = "Runs of `quick` are too small to test a difference like this: choose `cpu` for it.";
    if (size === "quick") between.append(element("p", { class: "how" }, words));
  }

  function draw(everything) {
    const { pins, runs, size, colours, guesses: made } = bench.model;
    const state = shownState();
    const shown = describe(state);
    const key = canonical(shown.changes);
    const found = stored.get(key);
    const end = ended(key, shown);
    const hides = guessing && end && !made[key];
    drawForm(fields(state), state);
    picture(
      place.picture,
      state,
      change,
      pins.map((pin) => ({ ...pin, colour: colours[pin.key] })),
    );
    const quick = kernel && size === "quick";
    const rings = pins.map((pin) => ({ at: ended(pin.key, describe(pin.state))?.at, colour: colours[pin.key] }));
    const here = found && { at: found.at, colour: "currentColor" };
    const own = runs.filter((run) => run.size === size && run.trail.length);
    drawPlane({
      stored: quick ? [] : data.runs,
      veiled: Boolean(hides),
      dots: quick ? data.band : [],
      front: quick ? [] : data.front,
      predicted: quick || hides || found ? null : shown.predicted,
      own: own.map((run) => ({ ...run, colour: colours[run.key] })),
      pinned: quick || hides ? [] : [...rings, here].filter((each) => each?.at),
      guess: guessing && end && made[key] ? { key, from: data.before, at: made[key], to: end.at } : null,
      guessing: hides ? guessing : null,
    });
    const ends = hides
      ? ""
      : found
        ? ` Stored, ${Object.keys(found.ends).length} runs: A_KA ${score(found, 0)}, A_ZS ${score(found, 1)}.`
        : shown.predicted
          ? ` Predicted: A_KA ${points(end.at[0])}, A_ZS ${points(end.at[1])}. ${shown.predicted.words}`
          : " No prediction: no stored run is near.";
    say(place.said, shown.sentence + ends);
    if (!everything) return;
    drawGuess(key, end);
    buttons.querySelector(".asks").setAttribute("aria-pressed", String(Boolean(guessing)));
    buttons.querySelector(".both")?.toggleAttribute("disabled", pins.length < 2);
    sizes.value = size;
    drawRows(runs, colours, (run) => run.label ?? describe(run.state).label, watched.isSilent());
    drawPins(colours);
    away();
    bench.drawn();
  }

  const told = kernel?.runs() ?? [];
  if (told.length) act({ told });
  bench.begin();
  if (live()) watched.begin();
}
