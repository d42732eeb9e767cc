"""Phrasings of every question that nano is trained on, in English and Chinese, and its small talk.

`{x}` and `{y}` are items of the image, `{c}` a colour, `{s}` a shape, `{p}` a plural. The first `NUM_MEASURED` phrasings
of each question are those that it is measured with. Data only.
"""

from train.nano.data.labels import Lang

NUM_MEASURED = 3

QUESTIONS: dict[str, dict[Lang, list[str]]] = {
    "thing": {
        "en": [
            "What is in this picture?", "What is this?", "What do you see?", "What does the picture show?", "What is shown here?",
            "Name the thing in the picture.", "Can you tell me what this is?", "Which object is this?", "What can be seen here?",
            "Please name what you see.", "What am I looking at?", "Tell me what is in the image.", "What's this?", "Identify the object.",
            "Do you know what this is?", "What is in the image?",
        ],
        "zh": [
            "图片里是什么？", "这是什么？", "你看到了什么？", "这张图显示的是什么？", "图中有什么？", "请说出图片里的东西。",
            "能告诉我这是什么吗？", "这是什么东西？", "画面里是什么？", "请说出你看到的东西。", "我看到的是什么？",
            "告诉我图里是什么。", "这张图片里有什么？", "认出这个物体。", "你知道这是什么吗？", "图上画的是什么？",
        ],
    },
    "flag": {
        "en": [
            "Which flag is this?", "Whose flag is this?", "What country does this flag belong to?", "Name the flag.",
            "Which country's flag is shown?", "What flag do you see?", "Can you identify this flag?", "Tell me which flag this is.",
            "This is the flag of which country?", "What is this flag?", "Which country uses this flag?", "Do you recognise this flag?",
            "What flag is in the picture?", "Please name this flag.",
        ],
        "zh": [
            "这是哪国的国旗？", "这是哪个国家或地区的旗帜？", "这面旗属于哪里？", "请说出这面旗帜的名字。", "图中是哪国国旗？",
            "你看到的是什么旗？", "能认出这面旗吗？", "告诉我这是哪里的旗。", "这面国旗是哪个国家的？", "这是什么旗？",
            "哪个国家用这面国旗？", "你认识这面旗吗？", "图片里是什么旗帜？", "请认出这面国旗。",
        ],
    },
    "digit": {
        "en": [
            "Which digit is this?", "What number is written here?", "Read the digit.", "What digit do you see?", "Which number is this?",
            "What is the handwritten digit?", "Please read this number.", "Tell me the digit in the picture.", "What number does it show?",
            "Can you read the digit?", "What digit was written?", "Which numeral is shown?",
        ],
        "zh": [
            "这是数字几？", "图中写的是什么数字？", "请读出这个数字。", "你看到了什么数字？", "这是哪个数字？", "手写的数字是几？",
            "请认一下这个数字。", "告诉我图片里的数字。", "上面写着数字几？", "能读出这个数字吗？", "这里写了几？", "图里是数字几？",
        ],
    },
    "word": {
        "en": [
            "What does it say?", "Read the word.", "What word is written here?", "Which word is printed?", "What is the word in the picture?",
            "Please read the text.", "What text do you see?", "Can you read this word?", "Tell me what is written.", "What's written in the image?",
            "Which word do you see?", "Spell out the printed word.",
        ],
        "zh": [
            "上面写着什么？", "请读出这个单词。", "图中写的是什么单词？", "印的是哪个词？", "图片里的单词是什么？", "请读出文字。",
            "你看到了什么文字？", "能读出这个词吗？", "告诉我写的是什么。", "图里写了什么？", "这是哪个单词？", "请认出印刷的单词。",
        ],
    },
    "count": {
        "en": [
            "How many items are there?", "How many things are in the picture?", "Count the items.", "How many objects do you see?",
            "What is the number of items?", "How many things can you see?", "Count everything in the picture.", "How many items are shown?",
            "How many things are there in all?", "Tell me how many objects there are.", "In total, how many items are there?", "How many objects are in the image?",
        ],
        "zh": [
            "一共有几个物体？", "图片里有多少个东西？", "数一数有几个物体。", "你看到几个物体？", "物体的数量是多少？", "能看到几个东西？",
            "数一数图里的所有东西。", "图中有几个物体？", "总共有多少个东西？", "告诉我有几个物体。", "总共有几个物体？", "这张图里有几个物体？",
        ],
    },
    "count_of": {
        "en": [
            "How many {p} are there?", "How many {p} do you see?", "Count the {p}.", "How many {p} are in the picture?", "What is the number of {p}?",
            "How many {p} can you see?", "Tell me how many {p} there are.", "How many {p} are shown?", "In this image, how many {p} are there?",
            "Please count the {p}.", "Can you count the {p}?", "How many {p} does the picture show?",
        ],
        "zh": [
            "有几个{x}？", "你看到几个{x}？", "数一数有几个{x}。", "图片里有几个{x}？", "{x}的数量是多少？", "能看到几个{x}？",
            "告诉我有几个{x}。", "图中有多少个{x}？", "这张图里有几个{x}？", "请数一数{x}。", "能数一下{x}吗？", "一共有几个{x}？",
        ],
    },
    "more": {
        "en": [
            "Are there more {x} or more {y}?", "Which are there more of, {x} or {y}?", "Of which are there more: {x} or {y}?",
            "Do you see more {x} or more {y}?", "More {x} or more {y}?", "Compare the {x} and the {y}: which are more?",
            "Tell me whether there are more {x} or more {y}.", "And are there more {x} or more {y}?",
        ],
        "zh": [
            "{x}多还是{y}多？", "是{x}更多还是{y}更多？", "{x}和{y}哪个更多？", "图里{x}多还是{y}多？", "比较一下：{x}和{y}哪个多？",
            "{x}与{y}相比，哪个更多？", "告诉我{x}多还是{y}多。", "那么{x}多还是{y}多？",
        ],
    },
    "colour": {
        "en": [
            "What colour is the {s}?", "Which colour does the {s} have?", "What is the colour of the {s}?", "Tell me the colour of the {s}.",
            "Name the colour of the {s}.", "The {s} is what colour?", "What color is the {s}?", "Which colour is the {s}?",
            "Can you tell the colour of the {s}?", "Look at the {s}. What colour is it?", "And what colour is the {s}?", "In what colour is the {s} drawn?",
        ],
        "zh": [
            "{s}是什么颜色的？", "{s}是哪种颜色？", "{s}的颜色是什么？", "告诉我{s}的颜色。", "说出{s}的颜色。", "图中的{s}是什么颜色？",
            "请问{s}是什么颜色？", "那个{s}是什么颜色的？", "能说出{s}的颜色吗？", "看看{s}，它是什么颜色？", "那么{s}是什么颜色的？", "{s}画的是什么颜色？",
        ],
    },
    "shape": {
        "en": [
            "Which shape is {c}?", "What shape is {c}?", "What is the {c} shape?", "Name the {c} shape.", "What shape does the {c} one have?",
            "The {c} one is what shape?", "Tell me which shape is {c}.", "Which of the shapes is {c}?", "What kind of shape is {c}?",
            "And which shape is {c}?", "Find the {c} shape. What is it?", "What is the shape of the {c} item?",
        ],
        "zh": [
            "哪个形状是{c}的？", "{c}的是什么形状？", "{c}的形状是什么？", "说出{c}的形状。", "{c}的那个是什么形状？", "图中{c}的是哪种形状？",
            "告诉我哪个形状是{c}的。", "这些形状中哪个是{c}的？", "什么形状是{c}的？", "那么哪个形状是{c}的？", "找到{c}的形状，它是什么？", "{c}的物体是什么形状？",
        ],
    },
    "left": {
        "en": [
            "What is to the left of the {y}?", "What is left of the {y}?", "Which item is to the left of the {y}?", "What do you see left of the {y}?",
            "Name what is to the left of the {y}.", "To the left of the {y}, what is there?", "What is on the left of the {y}?",
            "What is on the left side of the {y}?", "Tell me what is to the left of the {y}.", "And what is left of the {y}?",
        ],
        "zh": [
            "{y}的左边是什么？", "在{y}左边的是什么？", "哪个物体在{y}的左边？", "{y}左边有什么？", "说出{y}左边的东西。", "{y}的左侧是什么？",
            "{y}的左边有什么东西？", "什么在{y}的左边？", "告诉我{y}左边是什么。", "那么{y}的左边是什么？",
        ],
    },
    "right": {
        "en": [
            "What is to the right of the {y}?", "What is right of the {y}?", "Which item is to the right of the {y}?", "What do you see right of the {y}?",
            "Name what is to the right of the {y}.", "To the right of the {y}, what is there?", "What is on the right of the {y}?",
            "What is on the right side of the {y}?", "Tell me what is to the right of the {y}.", "And what is right of the {y}?",
        ],
        "zh": [
            "{y}的右边是什么？", "在{y}右边的是什么？", "哪个物体在{y}的右边？", "{y}右边有什么？", "说出{y}右边的东西。", "{y}的右侧是什么？",
            "{y}的右边有什么东西？", "什么在{y}的右边？", "告诉我{y}右边是什么。", "那么{y}的右边是什么？",
        ],
    },
    "above": {
        "en": [
            "What is above the {y}?", "Which item is above the {y}?", "What do you see above the {y}?", "Name what is above the {y}.",
            "What is on top of the {y}?", "What is over the {y}?", "Tell me what is above the {y}.", "Above the {y}, what is there?",
            "What lies above the {y}?", "And what is above the {y}?",
        ],
        "zh": [
            "{y}的上面是什么？", "在{y}上面的是什么？", "哪个物体在{y}的上面？", "{y}上面有什么？", "说出{y}上面的东西。", "{y}的上方是什么？",
            "{y}的上面有什么东西？", "什么在{y}的上面？", "告诉我{y}上面是什么。", "那么{y}的上面是什么？",
        ],
    },
    "below": {
        "en": [
            "What is below the {y}?", "Which item is below the {y}?", "What do you see below the {y}?", "Name what is below the {y}.",
            "What is under the {y}?", "What is beneath the {y}?", "Tell me what is below the {y}.", "Below the {y}, what is there?",
            "What lies below the {y}?", "And what is below the {y}?",
        ],
        "zh": [
            "{y}的下面是什么？", "在{y}下面的是什么？", "哪个物体在{y}的下面？", "{y}下面有什么？", "说出{y}下面的东西。", "{y}的下方是什么？",
            "{y}的下面有什么东西？", "什么在{y}的下面？", "告诉我{y}下面是什么。", "那么{y}的下面是什么？",
        ],
    },
    "sideways": {
        "en": [
            "Is the {x} to the left or to the right of the {y}?", "Is the {x} left or right of the {y}?", "On which side of the {y} is the {x}, left or right?",
            "Left or right: where is the {x} as seen from the {y}?", "Does the {x} lie to the left or to the right of the {y}?",
            "And the {x}, is it left or right of the {y}?",
        ],
        "zh": [
            "{x}在{y}的左边还是右边？", "{x}是在{y}的左边还是右边？", "从{y}看，{x}在左边还是右边？", "请问{x}在{y}的左边还是右边？",
            "那{x}在{y}的左边还是右边？", "{x}位于{y}的左侧还是右侧？",
        ],
    },
    "upright": {
        "en": [
            "Is the {x} above or below the {y}?", "Does the {x} lie above or below the {y}?", "Above or below: where is the {x} as seen from the {y}?",
            "Is the {x} over or under the {y}?", "And the {x}, is it above or below the {y}?", "Where is the {x}, above or below the {y}?",
        ],
        "zh": [
            "{x}在{y}的上面还是下面？", "{x}是在{y}的上面还是下面？", "从{y}看，{x}在上面还是下面？", "请问{x}在{y}的上面还是下面？",
            "那{x}在{y}的上面还是下面？", "{x}位于{y}的上方还是下方？",
        ],
    },
    "same": {
        "en": [
            "Do both pictures show the same thing?", "Is it the same thing in both pictures?", "Are these two the same?", "Do the two images show the same thing?",
            "Compare the pictures: is it the same thing?", "Same or different?", "Are both images of the same thing?", "Is the same thing in both images?",
            "Do these pictures match?", "Tell me whether both show the same thing.", "Are the two pictures of one kind of thing?", "Do I see the same thing twice?",
        ],
        "zh": [
            "两张图是同一种东西吗？", "两张图片里的东西一样吗？", "这两个一样吗？", "两幅图显示的是同一种东西吗？", "比较一下：是同一种东西吗？",
            "一样还是不一样？", "两张图都是同一种东西吗？", "两张图里是一样的东西吗？", "这两张图相同吗？", "告诉我两张图是不是同一种东西。",
            "两张图是同类的东西吗？", "我看到的是两个一样的东西吗？",
        ],
    },
    "describe": {
        "en": ["Describe the picture.", "Describe what you see.", "Give a short description.", "Please describe this image.", "What is going on here?", "Write a caption."],
        "zh": ["描述这张图片。", "描述你看到的。", "请简短地描述一下。", "请描述这幅图。", "说说图里的内容。", "写一句图片说明。"],
    },
}  # fmt: skip

# (phrasings, answer), English then Chinese
TALK: list[tuple[list[str], str]] = [
    (["Hello!", "Hi!", "Hello there.", "Hey!", "Good morning.", "Good evening.", "Hi nano!", "Good day.", "Greetings."],
     "Hello! Show me a picture and ask me about it."),
    (["Who are you?", "What are you?", "What is your name?", "Tell me about yourself.", "Introduce yourself.", "Are you a human?", "What should I call you?"],
     "I am nano, a small Yi-VL. I answer questions about simple pictures."),
    (["What can you do?", "How can you help me?", "What are you good at?", "What do you know?", "What can I ask you?", "Help!", "What are your skills?"],
     "I can name common things and flags, read digits and words, count, and tell colours, shapes and places."),
    (["Thank you!", "Thanks.", "Thanks a lot!", "Thank you very much.", "Cheers.", "That helps, thanks."], "You are welcome!"),
    (["Goodbye.", "Bye!", "See you later.", "Good night.", "I have to go.", "See you!"], "Goodbye!"),
    (["How are you?", "How do you do?", "How is it going?", "Are you well?"], "I am fine, thank you. Do you have a picture for me?"),
    (["Which languages do you speak?", "Do you speak Chinese?", "Can you speak English?", "What languages do you know?"],
     "I speak English and Chinese."),
    (["Who made you?", "Where do you come from?", "How were you trained?", "Who trained you?"],
     "I was trained by the yi_vl project, on two CPU cores, from drawings, flags, digits and words."),
    (["How big are you?", "How many parameters do you have?", "How large is your model?"], "I have about twelve million parameters."),
    (["Can you see photographs?", "Do you understand photos?", "Can you look at a photo?"], "No, I have only ever seen drawings, flags, digits and words."),
    (["What is in this picture?", "What do you see?", "What is this?", "Describe the picture."], "I see no picture. Please show me one."),
    (["你好！", "您好。", "嗨！", "早上好。", "晚上好。", "你好呀！", "哈喽！", "nano，你好！"], "你好！给我看一张图片，然后问我吧。"),
    (["你是谁？", "你叫什么名字？", "介绍一下你自己。", "你是什么？", "你是人类吗？", "请自我介绍。", "我该怎么称呼你？"],
     "我是nano，一个小小的Yi-VL。我回答关于简单图片的问题。"),
    (["你会做什么？", "你能帮我什么？", "你擅长什么？", "你知道什么？", "我可以问你什么？", "帮帮我！", "你有什么本领？"],
     "我能说出常见的东西和旗帜，能读数字和单词，会数数，能说出颜色、形状和位置。"),
    (["谢谢！", "谢谢你。", "非常感谢！", "多谢。", "太好了，谢谢。", "感谢！"], "不客气！"),
    (["再见。", "拜拜！", "回头见。", "晚安。", "我要走了。", "下次见！"], "再见！"),
    (["你好吗？", "最近怎么样？", "你还好吗？", "过得怎么样？"], "我很好，谢谢。你有图片给我看吗？"),
    (["你会说哪些语言？", "你会说中文吗？", "你会英语吗？", "你懂什么语言？"], "我会说英文和中文。"),
    (["谁创造了你？", "你从哪里来？", "你是怎么训练的？", "谁训练了你？"], "我由yi_vl项目用两个CPU核训练，素材是图画、旗帜、数字和单词。"),
    (["你有多大？", "你有多少参数？", "你的模型多大？"], "我大约有一千两百万个参数。"),
    (["你能看照片吗？", "你看得懂照片吗？", "可以给你看照片吗？"], "不能，我只见过图画、旗帜、数字和单词。"),
    (["图片里是什么？", "你看到了什么？", "这是什么？", "描述这张图片。"], "我没有看到图片。请给我看一张。"),
]  # fmt: skip
