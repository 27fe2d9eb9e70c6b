// Writes the index of a built site: node index.mjs FOLDER, with further words for its pages as JSON on its
// standard input.
import fs from "node:fs";
import path from "node:path";
import { indexOf } from "./public/search.mjs";

const [folder] = process.argv.slice(2);
const { records } = JSON.parse(fs.readFileSync(path.join(folder, "myst.search.json"), "utf-8"));
fs.writeFileSync(path.join(folder, "search.json"), indexOf(records, JSON.parse(fs.readFileSync(0, "utf-8"))));
