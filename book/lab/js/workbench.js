// The frame of every explorer, and the bench of those whose states are settings of runs.
import { cellOf, FORMS, takeAway } from "./export.js";
import { atRest, button, element, form, perFrame, places, points, recalled, remember, roving, say, score, table, toolbar } from "./form.js";
import { compare, isHeld, plane } from "./plane.js";
import { runRows } from "./runs.js";
import { accepted, begin, canonical, differing, kept, linked, linkTo, MOST_PINS, reduce, same } from "./state.js";

// What every explorer has: one model that only the reducer changes, buttons that begin from presets, undo
// and reset, and its place in the address, or in a notebook in the kernel, which outlives the page.
// `draw(everything)` shows the model: all of it, or what moves with a pointer; `acted` hears of each action.
// `start` is what a cell says of the state, and of the size of runs where there are `sizes`.
export function frame(el, { name, rules, kinds, kernel, start = {}, sizes = [], presets = [], place, draw, acted = () => {} }) {
  const { size = "cpu", ...began } = start;
  const isSize = !("size" in start) || sizes.includes(size);
  const [given, fault] = isSize ? accepted(began, kinds) : [{}, `size cannot be ${JSON.stringify(size)}`];
  rules = { ...rules, start: given };
  const warned = fault && `The cell’s settings cannot be shown, so you see the defaults: ${fault}.`;
  const read = () => (kernel ? null : linked(location.href, name, kinds));
  const saved = kernel?.saved();
  const opened = read();
  // on the site, guesses are kept until the window is closed
  const drawer = `guesses ${name}`;
  const guesses = kernel ? saved?.guesses : JSON.parse(recalled(drawer) ?? "{}");
  const begun = opened ? { state: opened[0], pins: opened[2] } : saved?.state ? saved : isSize ? { size } : {};
  let model = begin(rules, { ...begun, guesses });
  const follow = atRest(() => {
    if (kernel) return kernel.save(kept(model, rules));
    history.replaceState(null, "", address());
    remember(drawer, canonical(model.guesses));
  }, 250);
  const light = perFrame(() => draw(false));
  const rest = atRest(() => (isHeld() ? rest() : draw(true)));
  const whole = perFrame(() => draw(true));
  const address = () => {
    const { state, pins } = kept(model, rules);
    return linkTo(location.href, name, state, pins);
  };

  const bench = {
    rules,
    address,
    get model() {
      return model;
    },
    act(action) {
      model = reduce(model, action, rules);
      bench.warn("");
      acted(action);
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
      roving(place.presets.firstChild, "button"); // a disabled one must not keep the stop of the Tab key
    },
  };
  // A reader who comes back, or loads the page again, stays where she was.
  const comesBack = performance.getEntriesByType?.("navigation")[0]?.type !== "navigate";
  function land([state, wrong], mayScroll = true) {
    const changed = Object.keys(state).filter((key) => !same(model.state[key], state[key]));
    const together = changed.length ? `This link’s settings do not go together: ${changed.join(", ")} changed.` : "";
    bench.warn(wrong || together);
    if (mayScroll) el.scrollIntoView({ block: "start" });
  }
  // A link in the text of this page.
  function follows() {
    const found = read();
    if (!found) return;
    const [state, , pins] = found;
    model = reduce(model, { begin: state }, rules);
    if (pins.length) for (const { key } of model.pins) model = reduce(model, { unpin: key }, rules);
    for (const pin of pins) model = reduce(model, { pin: rules.settle({ ...rules.defaults, ...pin }, {}) }, rules);
    acted({ begin: state });
    whole();
    land(found);
  }
  place.presets.append(bench.buttons());
  bench.warn(warned);
  new ResizeObserver(whole).observe(el);
  if (!kernel) addEventListener("hashchange", follows);
  // A drag, or a slider that keys move on, is undone as one; every press, and every other choice, begins anew.
  const end = () => (model = reduce(model, { ended: true }, rules));
  for (const kind of ["pointerdown", "focusout"]) el.addEventListener(kind, end, true);
  el.addEventListener("change", ({ target }) => target.type !== "range" && end());
  el.addEventListener("keydown", (event) => {
    if (event.key !== "z" || !(event.ctrlKey || event.metaKey) || event.target.matches("input[type='text']")) return;
    event.preventDefault();
    bench.act({ undo: true });
  });
  const gone = element("p", { class: "gone", role: "status" });
  function heed() {
    say(gone, kernel.isSilent() ? "The kernel is busy or gone. If no cell is running, run this cell again." : "");
    draw(true);
  }
  return Object.assign(bench, {
    begin() {
      place.warned.before(gone);
      kernel?.onSilence(heed);
      kernel ? heed() : draw(true);
      el.dataset.ready = "";
      if (opened) requestAnimationFrame(() => land(opened, !comesBack)); // once the explorers above have their heights
    },
  });
}

// A bench for settings of runs. The explorer gives `fields(state)`, `picture(place, state, change, pins,
// {anew, passes})`, where `anew` is whether all begins again, and `passes` whether the state is shown only
// while a pointer rests on it, `describe(state, size)` -> {label, sentence, changes, parameters, lacks,
// predicted, refused}, where `refused` says why it cannot be run at a size of runs, `settle(state, changes)`, which
// makes a state possible, `note(before, after, changes)`, what to say of a change that changed more than was asked,
// `kinds`, what each key may be, and `misses`, the points of A_KA and A_ZS by which predictions err.
export function workbench(el, { table: data, kernel, start, name, model: about, picture, hint, actions = [], views = [] }) {
  const { fields, describe, settle, kinds, misses, note = () => "" } = about;
  const place = places(el, ["presets", "controls", "picture", "plane", "said", "warned", "guesses", "runs", "pins", "difference", "away"]);
  const drawn = element("div", {}, place.picture, element("p", { class: "key" }, hint));
  const sides = element("div", { class: "sides" }, drawn, place.plane);
  const why = element("p");
  const more = element("details", { class: "why" }, element("summary", { "aria-label": "How this is known" }, "?"), why);
  const line = element("div", { class: "line" }, place.said, more);
  const isWide = el.clientWidth > 700; // as in the style
  const fold = element("details", { class: "fold", open: isWide }, element("summary", {}, "Settings"), place.controls);
  el.classList.add("bench");
  el.append(place.presets, fold, sides, line, place.warned, place.runs, place.guesses, place.pins, place.difference, place.away);
  const rules = { defaults: data.defaults, settle, keyOf: (state) => canonical(describe(state).changes) };
  const { guess: guesses = false, ...given } = start ?? {};
  let seen = null; // a stored setting that the pointer is over
  let guess = guesses ? { at: null } : null; // while the reader guesses: the place of the ring, once it has one
  let revealed = null; // the guess that is shown beside its answer: {key, at, end, counts}
  let anew = true; // whether all begins again with the next drawing
  const bench = frame(el, { name, rules, kinds, kernel, start: given, sizes: Object.keys(data.sizes), presets: data.presets, place, draw, acted });
  const { act } = bench;
  const stored = new Map(data.runs.map((run) => [canonical(run.changes), run]));
  // `views` are keys that say how a setting is looked at; they stay when another setting is chosen
  const view = () => Object.fromEntries(views.map((key) => [key, bench.model.state[key]]));
  const shownState = () => (seen ? settle({ ...data.defaults, ...view(), ...seen.state }, {}) : bench.model.state);
  for (const run of data.runs) run.name = describe(settle({ ...data.defaults, ...run.state }, {})).label;

  // A guess ends with whatever shows another setting, but goes on while one is dragged.
  function acted(action) {
    if (["begin", "reset", "undo", "pin"].some((kind) => kind in action)) guess = null;
    if (["begin", "reset", "undo", "change"].some((kind) => kind in action)) revealed = null;
    if ("reset" in action) anew = true;
  }
  function change(changes) {
    const before = bench.model.state;
    act({ change: changes });
    const words = note(before, bench.model.state, changes);
    if (words) bench.warn(words);
  }
  const drawForm = form(place.controls, change, bench.warn);
  const drawPlane = plane(place.plane, {
    preview(run) {
      if (guess) run = null; // a guess is about the setting that was chosen
      if (seen === run) return;
      seen = run;
      requestAnimationFrame(() => draw(false));
    },
    choose: (run) => ((seen = null), act({ begin: { ...view(), ...run.state } })),
    pick: (at) => ((guess = { at }), requestAnimationFrame(() => draw(false))),
    miss: () => bench.warn("Click a dot of the plane to load its setting."),
  });
  place.picture.addEventListener("click", ({ target }) => {
    if (!target.closest(".handle, .clicked")) bench.warn(hint);
  });
  const away = takeAway(place.away, Object.keys(FORMS), () => {
    const { state, size } = bench.model;
    const link = kernel ? cellOf(name, differing(state, data.defaults), size) : bench.address();
    const shown = describe(state, size);
    return { profile: size, profiles: data.profiles, ...shown, chapter: data.chapter, link, missing: refusal(shown) };
  });

  // runs
  const refusal = ({ refused }) => refused && `This cannot be run: ${refused}.`;
  const tell = (verb, { size, key }, more = {}) => kernel.send({ verb, size, key, ...more });
  function launch(states) {
    const { runs: before, size } = bench.model;
    act({ run: states.filter((state) => !refusal(describe(state, size))) });
    for (const run of bench.model.runs.filter((each) => !before.includes(each))) {
      const { label, changes } = describe(run.state);
      tell("run", run, { label, changes });
    }
  }
  kernel?.whenever(() => bench.model.runs.some((run) => !run.over));
  kernel?.onRuns((told) => act({ told }));
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
    kernel && button("Run this", () => launch([bench.model.state]), { class: "go run-this" }),
    kernel && button("Run the first two pins", () => launch(pinned(2)), { class: "both" }),
    button("Pin to compare", pin),
    ...actions.map(({ label, to }) => button(label, () => compareWith(to), { class: "act" })),
    button("Guess where it ends", () => toggleGuess(), { class: "asks", "aria-pressed": "false" }),
  );
  place.runs.append(buttons, drawRows.place);
  function pin() {
    const { pins, state } = bench.model;
    act({ pin: state });
    if (bench.model.pins !== pins) return;
    const isPinned = pins.some(({ key }) => key === rules.keyOf(state));
    bench.warn(isPinned ? "This setting is already pinned." : `At most ${MOST_PINS} pins are compared: unpin one first.`);
  }
  function compareWith(to) {
    act({ pin: bench.model.state });
    act({ change: to(bench.model.state) });
    pin();
  }
  function showPair() {
    const states = data.pair.map((label) => data.runs.find((run) => run.label === label).state);
    act({ reset: true });
    for (const state of states) {
      act({ begin: state });
      act({ pin: bench.model.state });
    }
  }

  // guesses
  function toggleGuess() {
    guess = guess ? null : { at: null };
    seen = revealed = null;
    draw(true);
  }
  const ended = (key, shown) => stored.get(key) ?? shown.predicted;
  function reveal(key) {
    const { at } = guess;
    const end = ended(key, describe(bench.model.state));
    revealed = { key, at, end, counts: !(key in bench.model.guesses) };
    guess = null;
    act({ guess: { key, at } });
  }
  const miss = (one, other) => Math.hypot(one[0] - other[0], one[1] - other[1]);
  const where = (at) => `A_KA ${points(at[0])}, A_ZS ${points(at[1])}`;
  const revealButton = button("Reveal", () => reveal(revealButton.dataset.key), { class: "go" });
  const guessSaid = element("span", { "aria-live": "polite" });
  place.guesses.append(guessSaid, revealButton);
  function drawGuess(key, end) {
    const words = revealed
      ? revealedWords()
      : !guess
        ? ""
        : end
          ? "Where will this setting end? Click in the plane, or drag the ring."
          : "No stored run is near this setting, so a guess could not be checked.";
    say(guessSaid, words);
    revealButton.hidden = !guess || !end;
    revealButton.dataset.key = key;
    const ask = buttons.querySelector(".asks");
    ask.textContent = guess ? "Stop guessing" : revealed ? "Guess again" : "Guess where it ends";
    ask.setAttribute("aria-pressed", String(Boolean(guess)));
  }
  function revealedWords() {
    const { key, at, end, counts } = revealed;
    const all = Object.entries(bench.model.guesses).map(([each, guessed]) => [guessed, stored.get(each)?.at]);
    const known = all.filter(([, to]) => to).map(([guessed, to]) => miss(guessed, to));
    const mean = known.reduce((sum, each) => sum + each, 0) / known.length;
    const away = `${points(miss(at, end.at))} points away, at ${where(end.at)}`;
    const past = known.length > 1 ? ` Your ${known.length} guesses at stored settings miss by ${points(mean)} points on average.` : "";
    const ending = stored.has(key) ? `It ended ${away}.` : `The prediction is ${away}; this setting was not run.`;
    return `You guessed ${where(at)}. ${ending}${counts ? "" : " Only the first guess at a setting counts."}${past}`;
  }

  // Pins are drawn anew only when they change: a click on what is replaced while the button is down is lost.
  let pinsDrawn = "";
  function drawPins(colours) {
    const { pins, runs, size } = bench.model;
    const own = (key) => runs.find((run) => run.key === key && run.done && run.size === size)?.trail.at(-1);
    const looks = pins.map(({ key }) => [colours[key], own(key)]);
    const signature = canonical([pins, looks, size, place.difference.clientWidth]);
    if (signature === pinsDrawn) return;
    pinsDrawn = signature;
    const rows = pins.map(({ key, state }) => {
      const shown = describe(state, size);
      const known = ended(key, shown);
      const scored = (axis) => (known ? score(known, axis) : "–");
      const mine = own(key);
      const look = { class: "name", style: `border-color:${colours[key]}` };
      return [
        button(shown.label, () => act({ begin: differing(state, data.defaults) }), look),
        scored(0),
        scored(1),
        stored.has(key) ? "stored" : known ? "predicted" : shown.refused ? "cannot be run" : "nothing near",
        mine ? mine.map(points).join(", ") : "–",
        button("Unpin", () => act({ unpin: key })),
      ];
    });
    const head = ["pinned", "A_KA", "A_ZS", "from", kernel && `your run (${size})`, ""];
    const shownOf = (cells) => cells.filter((_, n) => head[n] != null); // no runs of one's own on the site
    const inPins = () => [...place.pins.querySelectorAll("button")];
    const focused = inPins().findIndex((each) => each.matches(":focus"));
    place.pins.replaceChildren(...(rows.length ? [table(shownOf(head), rows.map(shownOf))] : []));
    if (focused >= 0) (inPins()[focused] ?? inPins().at(-1))?.focus();
    if (pins.length < 2) return place.difference.replaceChildren();
    const compared = pins.map(({ key, state }) => {
      const shown = describe(state);
      return { ...(size === "cpu" ? ended(key, shown) : {}), label: shown.label, own: own(key) };
    });
    const isClose = compare(place.difference, compared, { ...data, misses });
    const [one, other] = data.pair;
    const tooClose = "Too close to tell: no stored run separates these two. ";
    const show = button(`Compare two that were run: ${one} and ${other}`, showPair);
    if (isClose) place.difference.prepend(element("p", { class: "close" }, tooClose, show));
    const words = "Runs of `quick` are too small to test a difference like this: choose `cpu` for it.";
    if (size === "quick") place.difference.append(element("p", { class: "how" }, words));
  }

  function draw(everything) {
    const { pins, runs, size, colours } = bench.model;
    const state = shownState();
    const shown = describe(state, size);
    const key = canonical(shown.changes);
    const found = stored.get(key);
    const end = ended(key, shown);
    const hides = Boolean(guess && end);
    el.classList.toggle("veiled", hides);
    // a reader in the form must not lose her place, or what she types, to a dot that the pointer passes
    const formed = place.controls.matches(":focus-within") ? bench.model.state : state;
    drawForm(fields(formed), formed);
    const pinned = pins.map((pin) => ({ ...pin, colour: colours[pin.key] }));
    picture(place.picture, state, change, pinned, { anew, passes: Boolean(seen) });
    anew = false;
    const quick = kernel && size === "quick";
    const rings = pinned.map((pin) => ({ ...ended(pin.key, describe(pin.state)), colour: pin.colour }));
    const here = found && { at: found.at, half: found.half, colour: "currentColor" };
    const own = runs.filter((run) => run.size === size && run.trail.length);
    drawPlane({
      stored: quick ? [] : data.runs,
      veiled: hides,
      dots: quick ? data.band : [],
      front: quick ? [] : data.front,
      predicted: quick || hides || found ? null : shown.predicted,
      own: own.map((run) => ({ ...run, colour: colours[run.key] })),
      pinned: quick || hides ? [] : [...rings, here].filter((each) => each?.at),
      guess: revealed && { key: canonical([revealed.key, revealed.at]), at: revealed.at, to: revealed.end.at },
      guessing: hides ? guess : null,
    });
    revealButton.disabled = !guess?.at;
    const ends = hides
      ? ""
      : found
        ? ` Stored, mean of ${Object.keys(found.ends).length} runs: A_KA ${score(found, 0)}, A_ZS ${score(found, 1)}.`
        : shown.predicted
          ? ` Predicted: A_KA ${score(end, 0)}, A_ZS ${score(end, 1)}.`
          : ` ${refusal(shown) || "No prediction: no stored run is near."}`;
    say(place.said, shown.sentence + ends);
    more.hidden = hides || Boolean(found) || !shown.predicted;
    say(why, shown.predicted?.words ?? "");
    if (!everything) return;
    drawGuess(key, end);
    buttons.querySelector(".run-this")?.toggleAttribute("disabled", Boolean(refusal(shown)));
    buttons.querySelector(".both")?.toggleAttribute("disabled", pins.length < 2);
    roving(buttons, "button");
    sizes.value = size;
    drawRows(runs, colours, (run) => run.label ?? describe(run.state).label, kernel?.isSilent());
    drawPins(colours);
    away();
    bench.drawn();
  }

  const told = kernel?.runs() ?? [];
  if (told.length) act({ told });
  bench.begin();
}
