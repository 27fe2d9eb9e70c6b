// What a reader takes away of a setting: commands, files, calls and links that compute the same run.
import { button, copyText, element } from "./form.js";

// Changes by dotted key as [section, rows of [key, value]]; keys outside sections come first, as rows of "".
function sections(changes) {
  const found = new Map();
  for (const [name, value] of Object.entries(changes)) {
    const [section, key] = name.includes(".") ? name.split(".") : ["", name];
    if (!found.has(section)) found.set(section, []);
    found.get(section).push([key, value]);
  }
  return [...found].sort(([one], [other]) => Boolean(one) - Boolean(other));
}

const python = (value) => {
  if (Array.isArray(value)) return `[${value.map(python).join(", ")}]`;
  return { true: "True", false: "False", null: "None" }[String(value)] ?? JSON.stringify(value);
};
export const keywords = (state) =>
  Object.entries(state)
    .map(([key, value]) => `${key}=${python(value)}`)
    .join(", ");

// The cell of a notebook that begins an explorer of runs.
export const cellOf = (name, state, size) =>
  `explorers.${name}_explorer(${keywords({ ...state, ...(size === "cpu" ? {} : { size }) })})`;

// A word of a shell's line: brackets and commas are quoted, since some shells look for files by them.
const quoted = (word) => (/^[\w.=:+/-]*$/.test(word) ? word : `'${word.replaceAll("'", `'"'"'`)}'`);
const plain = (value) => (typeof value === "string" ? value : JSON.stringify(value));

// Each gets {profile, profiles, changes, chapter, parameters, lacks, link}: `changes` to the profile;
// `profiles`, every profile's own settings by dotted key; the chapter's `parameters` that say the same,
// and what they cannot say.
export const FORMS = {
  command: ({ profile, changes }) => {
    const words = Object.entries(changes).map(([key, value]) => quoted(`${key}=${plain(value)}`));
    return [`cmpt run ${profile}`, ...words].join(" \\\n    ");
  },
  YAML: ({ profile, profiles, changes }) =>
    `# cmpt run FILE.yaml\n${sections({ ...profiles[profile], ...changes })
      .flatMap(([section, rows]) => [
        ...(section ? [`${section}:\n`] : []),
        ...rows.map(([key, value]) => `${section && "  "}${key}: ${JSON.stringify(value)}\n`),
      ])
      .join("")}`,
  Python: ({ profile, changes }) => {
    const given = sections(changes).flatMap(([section, rows]) => {
      const values = rows.map(([key, value]) => (section ? `"${key}": ` : `${key}=`) + python(value));
      return section ? [`${section}={${values.join(", ")}}`] : values;
    });
    return `${[`cmp.run("${profile}"`, ...given].join(",\n        ")})`;
  },
  papermill: ({ profile, chapter, parameters, lacks }) =>
    lacks.length
      ? null
      : [`cmpt book --chapter ${chapter} --profile ${profile}`, ...parameters.map(([key, value]) => `-P ${key}=${value}`)].join(" "),
  link: ({ link }) => link,
};

// A menu of forms, the text of the chosen one, and a button that copies it. Where nothing can be taken away,
// `given()` is {missing}, which says why.
export function takeAway(place, names, given) {
  const options = names.map((each) => element("option", { value: each }, each));
  const kind = element("select", { "aria-label": "Copy as", oninput: show }, ...options);
  const text = element("pre", { tabindex: 0 });
  const copy = button("Copy", async () => {
    copy.textContent = await copyText(text);
    setTimeout(() => (copy.textContent = "Copy"), 1500);
  });
  place.append(element("div", { class: "tools" }, element("span", {}, "Take it away as"), kind, copy), text);
  function show() {
    const about = given();
    const words = about && !about.missing && (about[kind.value] ?? FORMS[kind.value](about));
    const why = about && (about.missing || `The parameters of chapter ${about.chapter} cannot say this (${about.lacks?.join(", ")}): take the command.`);
    copy.disabled = !words;
    const shown = words || why || "";
    if (text.textContent !== shown) text.textContent = shown;
  }
  return show;
}
