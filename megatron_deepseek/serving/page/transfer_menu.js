// The menu that writes conversations to files and reads them.

import { branch, titleOf } from "./conversations.js";
import { dialogOf } from "./dialogs.js";
import { byId, download } from "./dom.js";
import { notice } from "./notices.js";
import { addAll, fileName, fromFile, toJson, toMarkdown, toMessages } from "./transfer.js";

// current(): the open conversation or null; added(id): open this one.
export function bindTransfer({ shelf, current, added }) {
  const dialog = dialogOf("transfer");
  const exporting = (id, ending, type, write) =>
    byId(id).addEventListener("click", () => {
      download(fileName(current(), ending), write(current()), type);
      dialog.close();
    });
  exporting("export-markdown", "md", "text/markdown", toMarkdown);
  exporting("export-json", "json", "application/json", (conversation) => toJson([conversation]));
  exporting("export-messages", "jsonl", "application/jsonl", toMessages);
  byId("export-all").addEventListener("click", () => {
    download(`conversations-${new Date().toISOString().slice(0, 10)}.json`, toJson(shelf.all()), "application/json");
    dialog.close();
  });
  byId("open-transfer").addEventListener("click", () => {
    const open = current();
    byId("transfer-title").textContent = open ? titleOf(open) : "No conversation is open";
    for (const id of ["export-markdown", "export-json", "export-messages"])
      byId(id).disabled = !open || !branch(open).length;
    byId("export-all").disabled = !shelf.all().length;
    dialog.showModal();
  });
  const file = byId("import-file");
  byId("import").addEventListener("click", () => file.click());
  file.addEventListener("change", async () => {
    if (!file.files.length) return;
    try {
      const made = fromFile(await file.files[0].text());
      const number = addAll(shelf, made);
      notice(number === 1 ? "A conversation was added." : `${number} conversations were added.`);
      dialog.close();
      added(made[0].id);
    } catch (error) {
      notice(`${file.files[0].name} cannot be read: ${error.message}.`);
      dialog.close();
    } finally {
      file.value = "";
    }
  });
}
