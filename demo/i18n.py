"""The page's texts, in English and in Chinese."""

from __future__ import annotations

import re
from typing import Literal, get_args

Language = Literal["en", "zh"]
LANGUAGES: tuple[Language, ...] = get_args(Language)

NANO: dict[Language, str] = {
    "en": "It names common things, flags, digits and short English words in drawings, counts and compares a few of "
    "them, and tells left from right. About most other images it says that it is not sure. It can be wrong.",
    "zh": "它能说出图画里的常见事物、旗帜、数字和简短的英文单词，能数数、比较、分左右。"
    "遇到照片等别的图像，它大多会说“我不确定。”。它会犯错。",
}
ANY_YI_VL: dict[Language, str] = {
    "en": "It describes images and answers questions about them, in English and Chinese. It can be wrong.",
    "zh": "它用中文或英文描述图片、回答关于图片的问题。它会犯错。",
}

TEXTS: dict[Language, dict[str, str]] = {
    "en": {
        "introduction": "# Yi-VL\n**{name}** answers: {parameters} parameters; "
        "it sees an image as {size_px} × {size_px} pixels. {about}",
        "kept": "The operator of this page keeps the conversations.",
        "chat": "Conversation",
        "welcome": "## Show me an image\n"
        "Drop it anywhere, paste it, or press 📎. Then ask in English or Chinese. Or try one of these:",
        "type_here": "Ask about an image …",
        "question": "Your question",
        "new_chat": "＋ New chat",
        "stop": "■ Stop",
        "default_question": "What is in this image?",
        "seen": "👁 As the model sees it",
        "seen_nothing": "There is no image yet.",
        "seen_caption": "{name}, {size} × {size} pixels",
        "camera": "📷 Camera",
        "settings": "⚙ Settings",
        "temperature": "Temperature",
        "temperature_info": "0 always takes the likeliest token; higher is more varied.",
        "top_p": "Top-p",
        "top_p_info": "Sample only from the likeliest tokens of this total probability.",
        "length": "Greatest length",
        "length_info": "Of an answer, in tokens.",
        "you": "You",
        "bad_image": "⚠️ **{name}** cannot be shown to the model.\n\n{error}\n\nTry another image.",
        "not_an_image": "⚠️ **{names}**: this is not an image. Use PNG, JPEG, WebP or another image format.",
        "too_large": "⚠️ **{names}**: an image may take {limit} MB at most. Save it smaller and try again.",
        "too_long": "⚠️ The input is too long: at least {num_tokens} tokens with {num_images} images; "
        "the model holds {limit}, the answer included. Use fewer images or a shorter text, or start a new chat.",
        "refused": "⚠️ This cannot be answered: {error}",
        "silent": "⚠️ The model gave an empty answer. Rephrase the question.",
        "failed": "⚠️ The server failed; your question is fine. Try again, or start a new conversation.",
        "interrupted": "⚠️ The page was closed before the answer was complete. Ask again.",
        "lost": "⚠️ The conversation is lost: its images are gone, or it was too long to keep.",
        "image_alt": "Image {number}: {name}",
        "model_card": "Model card",
        "model_licence": "the model's licence: {licence}",
        "code_licence": "the code's licence: [Apache-2.0](https://www.apache.org/licenses/LICENSE-2.0)",
        "foreign": "The file is no longer here, or was never yours.",
    },
    "zh": {
        "introduction": "# Yi-VL\n**{name}** 回答你的问题：{parameters} 个参数，"
        "看到的图片是 {size_px} × {size_px} 像素。{about}",
        "kept": "本页的运营者会保存对话。",
        "chat": "对话",
        "welcome": "## 给我看一张图片\n把图片拖进来、粘贴，或点 📎 上传，然后用中文或英文提问。也可以试试这些：",
        "type_here": "问一问图片……",
        "question": "你的问题",
        "new_chat": "＋ 新对话",
        "stop": "■ 停止",
        "default_question": "图片里是什么？",
        "seen": "👁 模型看到的图片",
        "seen_nothing": "还没有图片。",
        "seen_caption": "{name}，{size} × {size} 像素",
        "camera": "📷 拍照",
        "settings": "⚙ 设置",
        "temperature": "温度",
        "temperature_info": "0 总是取最可能的词元；越高越多样。",
        "top_p": "Top-p",
        "top_p_info": "只从概率之和达到此值的最可能的词元里抽取。",
        "length": "最大长度",
        "length_info": "一个回答最多多少词元。",
        "you": "你",
        "bad_image": "⚠️ **{name}** 无法给模型看：可能已损坏、过大，或者不是图片。请换一张。\n\n详细原因：{error}",
        "not_an_image": "⚠️ **{names}** 不是图片。PNG、JPEG、WebP 等格式都可以。",
        "too_large": "⚠️ **{names}** 太大了：一张图片最多 {limit} MB。请缩小后再试。",
        "too_long": "⚠️ 内容太长：至少 {num_tokens} 个词元（含 {num_images} 张图片），模型连同回答最多容纳 {limit} 个。"
        "请减少图片或缩短文字，或者开始新的对话。",
        "refused": "⚠️ 无法回答。详细原因：{error}",
        "silent": "⚠️ 模型没有回答。请换一种问法。",
        "failed": "⚠️ 这里出了问题，与你的提问无关。请再试一次，或开始新的对话。",
        "interrupted": "⚠️ 回答还没完成，页面就离开了。请再问一次。",
        "lost": "⚠️ 之前的对话已丢失：其中的图片已不在服务器上，或者对话太长，无法保存。",
        "image_alt": "图片 {number}：{name}",
        "model_card": "模型卡",
        "model_licence": "模型许可证：{licence}",
        "code_licence": "代码许可证：[Apache-2.0](https://www.apache.org/licenses/LICENSE-2.0)",
        "foreign": "文件已不在这里，或不属于你。",
    },
}


EXAMPLES: dict[Language, dict[str, tuple[str, ...]]] = {  # question -> file names in docs/images
    "en": {
        "What is in this image?": ("dog.png",),
        "Which country's flag is this?": ("brazil.png",),
        "Which digit is this?": ("digit.png",),
        "What word is written here?": ("word.png",),
        "How many items are there?": ("scene.png",),
        "What is below the fire truck?": ("umbrella.png",),
        "Do both images show the same thing?": ("cherries.png", "spider.png"),
        "What do you see?": ("flower.jpg",),  # nano is not sure
    },
    "zh": {
        "图片里是什么？": ("dog.png",),
        "这是哪里的旗帜？": ("brazil.png",),
        "这是数字几？": ("digit.png",),
        "图中写的是什么单词？": ("word.png",),
        "一共有几个物体？": ("scene.png",),
        "消防车的下面是什么？": ("umbrella.png",),
        "两张图是同一种东西吗？": ("cherries.png", "spider.png"),
        "你看到了什么？": ("flower.jpg",),
    },
}

# What Gradio says in English whatever the language is: the beginning of a label, or of a text of its own.
GRADIO_IN_CHINESE = {
    "user's message: a component of type image": "你的图片",
    "user's message: ": "你：",
    "bot's message: ": "模型：",
    "chatbot conversation": "对话",
    "Select example": "试试示例",
    "Example attachments": "示例图片",
    "Multimedia input field": "输入框",
    "Upload a file": "上传图片",
    "Uploaded files": "已选的图片",
    "Uploading": "正在上传",
    "File upload": "上传图片",
    "File thumbnail": "图片预览",
    "Remove file": "移除图片",
    "Submit": "发送",
    "Copy conversation": "复制对话",
    "Copied conversation": "已复制对话",
    "Copy message": "复制消息",
    "Copied message": "已复制消息",
    "copy": "复制",
    "Fullscreen": "全屏",
    "Exit fullscreen mode": "退出全屏",
    "Scroll down": "滚动到底部",
    "Loading response": "正在回答",
    "Loading content": "正在回答",
    "processing |": "正在处理 |",
    "queue: ": "排队：",
    "number input for ": "输入数值：",
    "range slider for ": "拖动数值：",
    "Reset to default value": "恢复默认值",
    "grant webcam access": "允许使用摄像头",
    "Click to Access Webcam": "点击以使用摄像头",
    "capture photo": "拍照",
    "select input source": "选择摄像头",
    "select source": "选择摄像头",
    "spinner": "请稍候",
}


def preferred(accept_language: str) -> Language:
    """The language that a browser prefers among the available ones; English where it accepts neither."""
    weighed: list[tuple[float, int, Language]] = []
    for entry in accept_language.lower().split(","):
        tag, _, quality = entry.strip().partition(";q=")
        weight = float(quality) if re.fullmatch(r"[01](\.\d*)?", quality) else 1.0
        weighed += [(-weight, len(weighed), language) for language in LANGUAGES if tag.split("-")[0] == language]
    return min(weighed)[2] if weighed else "en"
