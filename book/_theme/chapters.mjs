// A plugin of MyST: the directive {chapters} is the list of chapters, with a line on each, from the
// table of README.md; {explorer} NAME is the place of an explorer; the role {set}`words <NAME: STATE>` is a
// link that sets the explorer NAME of the same page, with STATE as JSON.
import fs from "node:fs";

const README = new URL("../../README.md", import.meta.url);
const ROW = /^\| *(\w+) *\| *\[(.+?)\]\(book\/(.+?)\) *\| *(.+?) *\|$/;

function listed() {
  const rows = fs
    .readFileSync(README, "utf-8")
    .split("\n")
    .map((line) => ROW.exec(line));
  return rows
    .filter((row) => row)
    .map(([, number, title, file, line]) => `* [${number} · ${title}](${file}): ${line}.`);
}

const DOOR = /^(\w\w) \[(.+?)\]\((.+?)\) (.+)$/;
function doors(body, context) {
  return body.trim().split("\n").flatMap((line) => {
    const [, number, title, file, words] = DOOR.exec(line) ?? [];
    if (!number) throw new Error(`{doors}: “${line}”: expected CHAPTER [title](file) words`);
    const [paragraph] = context.parseMyst(`[**${title}** ${words}](${file})`).children;
    return [{ type: "door", number, children: paragraph.children }];
  });
}

const SET = /^(.+?)\s*<(\w+):\s*(\{.*\})>$/s;

function set({ body }) {
  const [, words, name, state] = SET.exec(body) ?? [];
  try {
    JSON.parse(state);
  } catch {
    throw new Error(`{set}\`${body}\`: expected words <EXPLORER: {"key": value}>`);
  }
  return [{ type: "setExplorer", name, state, children: [{ type: "text", value: words }] }];
}

export default {
  name: "The list of chapters, and explorers",
  roles: [{ name: "set", body: { type: String, required: true }, run: set }],
  directives: [
    {
      name: "explorer",
      arg: { type: String, required: true },
      body: { type: "myst" }, // what stands there without JavaScript
      run: ({ arg, body }) => [{ type: "explorer", name: arg, children: body ?? [] }],
    },
    {
      // {doors}: each line is "CHAPTER [title](file) words", a large link to a chapter
      name: "doors",
      body: { type: String, required: true },
      run: ({ body }, file, context) => [{ type: "doors", children: doors(body, context) }],
    },
    { name: "chapters", run: (data, file, context) => context.parseMyst(listed().join("\n")).children },
  ],
};
