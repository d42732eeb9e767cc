// What Gradio's components leave to the page: images dropped or pasted anywhere on it, questions shown as they were
// typed, names of images, labels in the page's language, and a focus and a scroll position that are not lost.
() => {
    const { maxBytes, imageAlt, labels } = SETTINGS;
    const language = document.documentElement.lang.slice(0, 2); // Gradio may have made it longer
    document.documentElement.lang = language;

    // Refused files are reported to handlers.refuse; Gradio's own message would be elsewhere and in English.
    const reportRefused = (refused) => {
        const field = document.querySelector("#refused textarea");
        field.value = JSON.stringify({ ...refused, at: Date.now() }); // Gradio notices changes only
        field.dispatchEvent(new Event("input", { bubbles: true }));
    };
    const upload = (event, files) => {
        const input = document.querySelector("#typed input[type=file]");
        if (event.defaultPrevented || !input || !files.length) return;
        event.preventDefault();
        input.files = files;
        input.dispatchEvent(new Event("change", { bubbles: true }));
    };
    const filterFiles = (event) => {
        const input = event.target;
        if (!input.matches("#typed input[type=file]")) return;
        const accepted = new DataTransfer();
        const refused = { not_an_image: [], too_large: [] };
        for (const file of input.files) {
            if (!file.type.startsWith("image/")) refused.not_an_image.push(file.name);
            else if (file.size > maxBytes) refused.too_large.push(file.name);
            else accepted.items.add(file);
        }
        if (accepted.files.length === input.files.length) return;
        input.files = accepted.files;
        if (!accepted.files.length) event.stopImmediatePropagation();
        reportRefused(refused);
    };
    addEventListener("dragover", (event) => event.preventDefault());
    addEventListener("drop", (event) => upload(event, event.dataTransfer.files));
    addEventListener("paste", (event) => upload(event, event.clipboardData.files));
    addEventListener("change", filterFiles, true); // before Gradio

    // Gradio renders every message as Markdown; what was typed is left in the label alone.
    const showAsTyped = (bubble) => {
        const prefix = "user's message: ";
        if (bubble.ariaLabel?.startsWith(prefix)) bubble.typed = bubble.ariaLabel.slice(prefix.length);
        const shown = bubble.querySelector(".message-content > .md");
        if (shown?.childNodes.length && shown.textContent !== bubble.typed) shown.textContent = bubble.typed;
    };
    const nameImage = (image, index) => {
        const name = decodeURIComponent(new URL(image.src).pathname.split("/").pop());
        const alt = imageAlt[language].replace("{number}", index + 1).replace("{name}", name);
        if (image.alt !== alt) image.alt = alt;
    };
    const starts = Object.keys(labels[language]);
    const translated = (label) => {
        const start = starts.find((start) => label.startsWith(start));
        return start && labels[language][start] + label.slice(start.length);
    };
    const translate = () => {
        for (const name of ["aria-label", "title"])
            for (const element of document.querySelectorAll(`[${name}]`)) {
                const label = translated(element.getAttribute(name));
                if (label) element.setAttribute(name, label);
            }
        for (const part of document.querySelectorAll("#chat [role=status], [data-testid=status-tracker], #camera")) {
            const walker = document.createTreeWalker(part, NodeFilter.SHOW_TEXT);
            while (walker.nextNode()) {
                const text = translated(walker.currentNode.data.trimStart());
                if (text) walker.currentNode.data = text;
            }
        }
    };

    const chatEnd = new ResizeObserver(([{ target }]) => {
        if (target.isAtEnd) target.scrollTo(0, target.scrollHeight); // else an opened drawer hides the last answer
    });
    const noteEnd = ({ target }) => {
        if (target.matches?.("#chat .bubble-wrap"))
            target.isAtEnd = target.scrollTop + target.offsetHeight > target.scrollHeight - 50;
    };
    addEventListener("scroll", noteEnd, true);

    let box, chat;
    let wasDisabled = true; // so the box has the focus at first
    const refresh = () => {
        document.querySelectorAll("#chat [data-testid=user]").forEach(showAsTyped);
        document.querySelectorAll("#chat [data-testid=user] img").forEach(nameImage);
        document.querySelectorAll("#typed .thumbnail-item img").forEach(nameImage);
        if (starts.length) translate();
        if (chat !== (chat = document.querySelector("#chat .bubble-wrap")) && chat) chatEnd.observe(chat);
        box = document.querySelector("#typed textarea");
        const isLost = wasDisabled && !box?.disabled && document.activeElement === document.body;
        if (isLost && !matchMedia("(pointer: coarse)").matches) box?.focus(); // a phone's keyboard would cover the answer
        wasDisabled = box?.disabled;
    };
    const attributeFilter = ["aria-label", "title", "src", "disabled"];
    new MutationObserver(refresh).observe(document.body, { attributeFilter, characterData: true, childList: true, subtree: true });
    refresh();
    for (const link of document.querySelectorAll("nav a[hreflang]"))
        if (link.hreflang === language) link.ariaCurrent = "true";
    addEventListener("pagehide", () => {
        sessionStorage.setItem("isAnswering", Boolean(document.querySelector("#typed .stop-button")));
    });
}
