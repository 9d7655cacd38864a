"""Small stories, from parts that fit together.

Purpose: prose for the sample corpora that a small model can begin to learn in two minutes.
Principle: somebody is somewhere, something happens for a reason, and it has a consequence. Each part is drawn by itself, and
    the parts of one plot belong together, so that sentences follow from those before.
Properties: one function a language; the same random generator gives the same story.
"""

from __future__ import annotations

from random import Random

NAMES_EN = ["Tom", "Anna", "Lucy", "Ben", "Mia", "Sam", "Ella", "Jack", "Rose", "Leo", "Nina", "Paul", "Ivy", "Max"]
NAMES_ZH = ["小明", "小红", "小刚", "小丽", "小华", "阿宝", "小雨", "小杰", "小芳", "小军", "小云", "小林"]
RELATIVES_EN = ["grandmother", "grandfather", "mother", "father", "sister", "brother", "neighbour", "teacher", "friend"]
RELATIVES_ZH = ["奶奶", "爷爷", "妈妈", "爸爸", "姐姐", "弟弟", "邻居", "老师", "朋友"]
PLACES_EN = ["the village", "the river", "the market", "the forest", "the school", "the harbour", "the old bridge"]
PLACES_EN += ["the library", "the hill behind the house", "the railway station", "the park", "the lake"]
PLACES_ZH = ["村子", "河边", "集市", "森林", "学校", "码头", "老桥", "图书馆", "屋后的小山", "火车站", "公园", "湖边"]
TIMES_EN = ["One morning", "One evening", "On a cold day in winter", "On the first day of spring", "After the rain"]
TIMES_EN += ["Last Sunday", "In the middle of summer", "Early in autumn", "Before sunrise", "At noon"]
TIMES_ZH = [
    "一天早上",
    "一天傍晚",
    "一个寒冷的冬日",
    "春天的第一天",
    "雨停以后",
    "上个星期天",
    "盛夏的一天",
    "初秋的一天",
    "日出之前",
    "中午",
]
WEATHER_EN = ["The wind was strong", "The sun was warm", "A light rain was falling", "Snow covered the ground"]
WEATHER_EN += ["The sky was clear", "Fog lay over the fields", "Clouds were gathering", "The air smelled of flowers"]
WEATHER_ZH = [
    "风很大",
    "阳光很暖和",
    "天上下着小雨",
    "地上盖着雪",
    "天空很晴朗",
    "田野上有雾",
    "云越来越多",
    "空气里有花香",
]
FEELINGS_EN = ["happy", "proud", "surprised", "calm", "grateful", "a little sad", "tired but content"]
FEELINGS_ZH = ["高兴", "自豪", "惊讶", "平静", "感激", "有一点难过", "虽然累却很满足"]
LESSONS_EN = [
    "Small steps lead far.",
    "A good friend is worth more than gold.",
    "It is better to ask than to guess.",
    "Patience makes hard things easy.",
    "What is shared is enjoyed twice.",
    "Every mistake teaches something.",
    "Who helps others is seldom alone.",
]
LESSONS_ZH = [
    "一步一步走，就能走得很远。",
    "好朋友比金子还珍贵。",
    "不懂就要问，不要乱猜。",
    "有耐心，难事也会变容易。",
]
LESSONS_ZH += ["分享的快乐是两份快乐。", "每个错误都能教会我们一点东西。", "帮助别人的人很少孤单。"]

# (what happens, what is done about it, how it ends); {a} is the hero, {b} another, {p} a place
PLOTS_EN = [
    (
        "{a} found a bird with a broken wing near {p}",
        "{a} made a nest of {soft} and fed it {food} every day",
        "After {n} weeks the bird could fly again",
    ),
    (
        "{a} lost a {thing} on the way to {p}",
        "{a} walked back slowly and looked under every {under}",
        "In the end {b} had found it and kept it safe",
    ),
    (
        "{a} wanted to bake a cake for {b}, but there was no {ingredient} in the house",
        "{a} went to {p} and exchanged {n} apples for it",
        "The cake was not perfect, yet nothing was left of it",
    ),
    (
        "The bridge near {p} was broken after the storm",
        "{a} and {b} carried {n} long boards there and repaired it",
        "Now everybody can cross the water again",
    ),
    (
        "{a} planted {n} seeds behind the house",
        "Every evening {a} gave them water and waited",
        "When the first {plant} came up, {a} called {b} to see it",
    ),
    (
        "{a} was afraid of the dark path to {p}",
        "{b} gave {a} a small lamp and said that the dark only hides what the day shows",
        "From then on {a} walked the path alone",
    ),
    (
        "A {animal} had lost its way and stood at the door of {b}",
        "{a} gave it {food} and asked everybody near {p}",
        "By evening the {animal} was home again",
    ),
    (
        "{a} wanted to read a thick book in {n} days",
        "{a} read a few pages each morning before going to {p}",
        "On the last day {a} told the whole story to {b}",
    ),
    (
        "{b} was ill and could not go to {p}",
        "{a} cooked soup with {food} and brought a {thing}",
        "Two days later they went to {p} together",
    ),
    (
        "{a} built a kite from paper and a {thing}",
        "The first {n} attempts failed because the tail was too short",
        "Then {a} made it longer, and the kite rose above {p}",
    ),
]
SLOTS_EN = {
    "soft": ["dry grass", "wool", "old cloth", "feathers"],
    "food": ["bread", "rice", "carrots", "seeds", "apples", "fish"],
    "thing": [
        "key",
        "red scarf",
        "silver coin",
        "letter",
        "wooden box",
        "blue umbrella",
        "little bell",
        "piece of string",
    ],
    "under": ["stone", "bench", "bush", "leaf"],
    "ingredient": ["sugar", "flour", "butter", "milk"],
    "plant": ["sunflower", "bean", "tomato", "pumpkin"],
    "animal": ["dog", "cat", "goat", "duck", "pony"],
}
PLOTS_ZH = [
    ("{a}在{p}发现一只翅膀受伤的小鸟", "{a}用{soft}给它做了一个窝，每天喂它吃{food}", "过了{n}个星期，小鸟又能飞了"),
    ("{a}去{p}的路上丢了{thing}", "{a}慢慢往回走，把每一{under}都找了一遍", "原来是{b}捡到了，还一直好好保管着"),
    (
        "{a}想给{b}做一个蛋糕，可是家里没有{ingredient}",
        "{a}去{p}用{n}个苹果换了一些",
        "蛋糕虽然不完美，却被吃得一点不剩",
    ),
    ("暴风雨以后，{p}旁边的桥坏了", "{a}和{b}搬来{n}块长木板，把桥修好了", "现在大家又可以过河了"),
    ("{a}在屋后种下了{n}粒种子", "每天傍晚{a}都给它们浇水，耐心地等着", "第一棵{plant}长出来的时候，{a}叫{b}来看"),
    ("去{p}的小路很黑，{a}有些害怕", "{b}给了{a}一盏小灯，说黑夜只是把白天的东西藏了起来", "从那以后{a}就敢一个人走了"),
    ("一只迷路的{animal}站在{b}的家门口", "{a}给它喂了{food}，又问遍了{p}附近的人", "到了晚上，{animal}终于回到了家"),
    ("{a}想在{n}天里读完一本厚厚的书", "每天早上去{p}以前，{a}都读几页", "最后一天，{a}把整个故事讲给了{b}听"),
    ("{b}病了，不能去{p}", "{a}用{food}煮了汤，还带去了{thing}", "两天以后，他们一起去了{p}"),
    ("{a}用纸和{thing}做了一只风筝", "前{n}次都失败了，因为尾巴太短", "后来{a}把尾巴加长，风筝飞到了{p}的上空"),
]
SLOTS_ZH = {
    "soft": ["干草", "羊毛", "旧布", "羽毛"],
    "food": ["面包", "米饭", "胡萝卜", "种子", "苹果", "小鱼"],
    "thing": ["钥匙", "红围巾", "银币", "信", "木盒子", "蓝雨伞", "小铃铛", "细绳"],
    "under": ["块石头下", "张长椅下", "丛灌木里", "片落叶下"],
    "ingredient": ["糖", "面粉", "黄油", "牛奶"],
    "plant": ["向日葵", "豆苗", "番茄", "南瓜"],
    "animal": ["小狗", "小猫", "山羊", "鸭子", "小马"],
}


def story_en(rng: Random) -> str:
    """A story in English.

    Args:
        rng: decides everything.
    """
    hero = rng.choice(NAMES_EN)
    other = (
        f"{hero}'s {rng.choice(RELATIVES_EN)}" if rng.random() < 0.6 else rng.choice([n for n in NAMES_EN if n != hero])
    )
    slots = {name: rng.choice(words) for name, words in SLOTS_EN.items()}
    slots.update(a=hero, b=other, p=rng.choice(PLACES_EN), n=rng.choice(["two", "three", "four", "five", "six"]))
    event, action, ending = (part.format(**slots) for part in rng.choice(PLOTS_EN))
    lead = rng.choice(TIMES_EN)
    sentences = [
        f"{lead}, {event[0].lower() + event[1:] if event.startswith(('A ', 'The ')) else event}.",
        f"{rng.choice(WEATHER_EN)}.",
        f"{action}.",
        f"{ending}.",
        f"{hero} was {rng.choice(FEELINGS_EN)}.",
    ]
    if rng.random() < 0.5:
        sentences.append(rng.choice(LESSONS_EN))
    if rng.random() < 0.3:
        sentences.insert(0, f"Once upon a time there was a child called {hero} who lived near {rng.choice(PLACES_EN)}.")
    return " ".join(sentences)


def story_zh(rng: Random) -> str:
    """A story in Chinese.

    Args:
        rng: decides everything.
    """
    hero = rng.choice(NAMES_ZH)
    other = (
        f"{hero}的{rng.choice(RELATIVES_ZH)}" if rng.random() < 0.6 else rng.choice([n for n in NAMES_ZH if n != hero])
    )
    slots = {name: rng.choice(words) for name, words in SLOTS_ZH.items()}
    slots.update(a=hero, b=other, p=rng.choice(PLACES_ZH), n=rng.choice("两三四五六"))
    event, action, ending = (part.format(**slots) for part in rng.choice(PLOTS_ZH))
    sentences = [
        f"{rng.choice(TIMES_ZH)}，{event}。",
        f"{rng.choice(WEATHER_ZH)}。",
        f"{action}。",
        f"{ending}。",
        f"{hero}心里{rng.choice(FEELINGS_ZH)}。",
    ]
    if rng.random() < 0.5:
        sentences.append(rng.choice(LESSONS_ZH))
    if rng.random() < 0.3:
        sentences.insert(0, f"从前有个孩子叫{hero}，住在{rng.choice(PLACES_ZH)}附近。")
    return "".join(sentences)
