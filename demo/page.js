// Pictures may be dropped or pasted anywhere on the page, not only where one types. Those that are refused are told to
// actions.refuse, which says so in the chat; Gradio alone would say it in its own words, elsewhere, in English.
() => {
    const MAX_BYTES = MAX_PICTURE_BYTES;
    const tell = (refused) => {
        const field = document.querySelector("#refused textarea");
        field.value = JSON.stringify({ ...refused, at: Date.now() }); // Gradio hears of changes only
        field.dispatchEvent(new Event("input", { bubbles: true }));
    };
    const take = (event, files) => {
        const input = document.querySelector("#typed input[type=file]");
        if (event.defaultPrevented || !input || !files.length) return;
        event.preventDefault();
        input.files = files;
        input.dispatchEvent(new Event("change", { bubbles: true }));
    };
    const sift = (event) => {
        const input = event.target;
        if (!input.matches("#typed input[type=file]")) return;
        const accepted = new DataTransfer();
        const refused = { not_a_picture: [], too_large: [] };
        for (const file of input.files) {
            if (!file.type.startsWith("image/")) refused.not_a_picture.push(file.name);
            else if (file.size > MAX_BYTES) refused.too_large.push(file.name);
            else accepted.items.add(file);
        }
        if (accepted.files.length === input.files.length) return;
        input.files = accepted.files;
        if (!accepted.files.length) event.stopImmediatePropagation();
        tell(refused);
    };
    addEventListener("dragover", (event) => event.preventDefault());
    addEventListener("drop", (event) => take(event, event.dataTransfer.files));
    addEventListener("paste", (event) => take(event, event.clipboardData.files));
    addEventListener("change", sift, true); // before Gradio
}
