"""Short stories and remarks, assembled from compatible parts.

Purpose: prose for the sample corpora that a small model can start to learn in two minutes.
Principle: someone is somewhere, something happens for a reason, and it has a consequence. Parts are drawn independently,
    except that incompatible ones (snow in summer, sowing in winter) never meet.
Properties: deterministic for a given generator; both languages work alike.
"""

from __future__ import annotations

from random import Random

BOYS_EN = ["Tom", "Ben", "Sam", "Jack", "Leo", "Paul", "Max"]
NAMES_EN = [*BOYS_EN, "Anna", "Lucy", "Mia", "Ella", "Rose", "Nina", "Ivy"]
NAMES_ZH = ["小明", "小红", "小刚", "小丽", "小华", "阿宝", "小雨", "小杰", "小芳", "小军", "小云", "小林"]
RELATIVES_EN = ["grandmother", "grandfather", "mother", "father", "sister", "brother", "neighbour", "teacher", "friend"]
RELATIVES_ZH = ["奶奶", "爷爷", "妈妈", "爸爸", "姐姐", "弟弟", "邻居", "老师", "朋友"]
PLACES_EN = ["the village", "the river", "the market", "the forest", "the school", "the harbour", "the old bridge"]
PLACES_EN += ["the library", "the hill behind the house", "the railway station", "the park", "the lake"]
PLACES_ZH = ["村子", "河边", "集市", "森林", "学校", "码头", "老桥", "图书馆", "屋后的小山", "火车站", "公园", "湖边"]

WEATHER = {
    "wind": ("The wind was strong", "风很大"),
    "sun": ("The sun was warm", "阳光很暖和"),
    "rain": ("A light rain was falling", "天上下着小雨"),
    "snow": ("Snow covered the ground", "地上盖着雪"),
    "clear": ("The sky was clear", "天空很晴朗"),
    "fog": ("Fog lay over the fields", "田野上有雾"),
    "clouds": ("Clouds were gathering", "云越来越多"),
    "flowers": ("The air smelled of flowers", "空气里有花香"),
}
# Times in both languages, and the weather that suits each.
TIMES = {
    "morning": ("One morning", "一天早上", "wind sun rain clear fog clouds"),
    "evening": ("One evening", "一天傍晚", "wind rain clear fog clouds"),
    "winter": ("On a cold day in winter", "一个寒冷的冬日", "wind snow clear fog clouds"),
    "spring": ("On the first day of spring", "春天的第一天", "wind sun rain clear clouds flowers"),
    "rained": ("After the rain", "雨停以后", "wind sun clear fog flowers"),
    "sunday": ("Last Sunday", "上个星期天", "wind sun rain clear fog clouds"),
    "summer": ("In the middle of summer", "盛夏的一天", "wind sun rain clear clouds flowers"),
    "autumn": ("Early in autumn", "初秋的一天", "wind sun rain clear fog clouds"),
    "sunrise": ("Before sunrise", "日出之前", "wind rain clear fog clouds"),
    "noon": ("At noon", "中午", "wind sun rain clear clouds"),
}
FEELINGS_EN = ["happy", "glad", "proud", "calm", "grateful", "tired but content"]
FEELINGS_ZH = ["心里很高兴", "心里很快活", "心里很自豪", "心里很平静", "心里很感激", "虽然很累，却很满足"]
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

# (event, response, ending) in each language, and the times and weather that do not suit it.
# {a}: the hero. {b}: someone else (a name or "his mother"); {B}: at the start of a sentence; {full}: before the hero is
# named ("Tom's mother"). {p}: a place.
PLOTS = [
    (
        "{a} found a bird with a broken wing near {p}",
        "{a} made a nest of {soft} and fed it {crumbs} every day",
        "After {n} weeks the bird could fly again",
        "{a}在{p}附近发现一只翅膀受伤的小鸟",
        "{a}用{soft}给它做了一个窝，每天喂它吃{crumbs}",
        "过了{n}个星期，小鸟又能飞了",
        "",
    ),
    (
        "{a} lost a {thing} on the way to {p}",
        "{a} walked back slowly and looked under every {under}",
        "In the end {b} had found it and kept it safe",
        "{a}去{p}的路上丢了{thing}",
        "{a}慢慢往回走，把每一{under}都找了一遍",
        "原来是{b}捡到了，还一直好好保管着",
        "",
    ),
    (
        "{a} wanted to bake a cake for {b}, but there was no {ingredient} in the house",
        "{a} went to {shop} and exchanged {n} apples for it",
        "The cake was not perfect, yet nothing was left of it",
        "{a}想给{b}做一个蛋糕，可是家里没有{ingredient}",
        "{a}去{shop}用{n}个苹果换了一些",
        "蛋糕虽然不完美，却被吃得一点不剩",
        "sunrise",
    ),
    (
        "the bridge near {water} was broken after the storm",
        "{a} and {b} carried {n} long boards there and repaired it",
        "Now everybody can cross the water again",
        "暴风雨以后，{water}的桥坏了",
        "{a}和{b}搬来{n}块长木板，把桥修好了",
        "现在大家又可以过河了",
        "rained sunrise",
    ),
    (
        "{a} planted {n} seeds behind the house",
        "Every evening {a} gave them water and waited",
        "When the first {plant} came up, {a} called {b} to see it",
        "{a}在屋后种下了{n}粒种子",
        "每天傍晚{a}都给它们浇水，耐心地等着",
        "第一棵{plant}长出来的时候，{a}叫{b}来看",
        "winter autumn sunrise",
    ),
    (
        "{a} was afraid of the dark path to {p}",
        "{B} gave {a} a small lamp and said that the dark only hides what the day shows",
        "From then on {a} walked the path alone",
        "去{p}的小路很黑，{a}有些害怕",
        "{b}给了{a}一盏小灯，说黑夜只是把白天的东西藏了起来",
        "从那以后{a}就敢一个人走了",
        "morning noon sun",
    ),
    (
        "a {animal} that had lost its way stood at {a}'s door",
        "{a} gave it {food} and went with {b} to ask everybody near {p}",
        "At last the {animal} was home again",
        "一只迷路的{animal}站在{a}的家门口",
        "{a}给它喂了{food}，又和{b}一起问遍了{p}附近的人",
        "最后，{animal}终于回到了家",
        "sunrise",
    ),
    (
        "{a} wanted to read a thick book in {n} days",
        "{a} read a few pages each morning before going to {p}",
        "On the last day {a} told the whole story to {b}",
        "{a}想在{n}天里读完一本厚厚的书",
        "每天早上去{p}以前，{a}都读几页",
        "最后一天，{a}把整个故事讲给了{b}听",
        "",
    ),
    (
        "{full} was ill and could not go to {p}",
        "{a} cooked soup with {soup} and brought a {gift}",
        "Two days later they went to {p} together",
        "{full}病了，不能去{p}",
        "{a}用{soup}煮了汤，还带去了{gift}",
        "两天以后，他们一起去了{p}",
        "sunrise",
    ),
    (
        "{a} built a kite from paper and {sticks}",
        "The first {n} attempts failed because the tail was too short",
        "Then {a} made it longer, and the kite rose above {p}",
        "{a}用纸和{sticks}做了一只风筝",
        "前{n}次都失败了，因为尾巴太短",
        "后来{a}把尾巴加长，风筝飞到了{p}的上空",
        "evening sunrise rain fog snow",
    ),
]
# Words for the other slots, the same in both languages.
SLOTS = {
    "soft": [("dry grass", "干草"), ("wool", "羊毛"), ("old cloth", "旧布"), ("feathers", "羽毛")],
    "crumbs": [("bread crumbs", "面包屑"), ("seeds", "种子"), ("rice", "米粒")],
    "thing": [
        ("key", "一把钥匙"),
        ("red scarf", "一条红围巾"),
        ("silver coin", "一枚银币"),
        ("letter", "一封信"),
        ("wooden box", "一个木盒子"),
        ("blue umbrella", "一把蓝雨伞"),
        ("little bell", "一个小铃铛"),
        ("ball", "一个球"),
    ],
    "gift": [("letter", "一封信"), ("red scarf", "一条红围巾"), ("story book", "一本故事书"), ("pear", "一个梨")],
    "sticks": [("two thin sticks", "两根细棍"), ("a piece of string", "一根细绳"), ("old cloth", "旧布")],
    "under": [("stone", "块石头下"), ("bench", "张长椅下"), ("bush", "丛灌木下"), ("leaf", "片树叶下")],
    "ingredient": [("sugar", "糖"), ("flour", "面粉"), ("butter", "黄油"), ("milk", "牛奶")],
    "shop": [("the market", "集市"), ("the village", "村子"), ("the harbour", "码头"), ("the farm", "农场")],
    "water": [("the river", "河边"), ("the lake", "湖边"), ("the village", "村口"), ("the old mill", "旧磨坊旁")],
    "plant": [("sunflower", "向日葵"), ("bean", "豆苗"), ("tomato", "番茄"), ("pumpkin", "南瓜")],
    "animal": [("dog", "小狗"), ("cat", "小猫"), ("goat", "山羊"), ("duck", "鸭子"), ("pony", "小马")],
    "soup": [("carrots", "胡萝卜"), ("fish", "鱼"), ("beans", "豆子"), ("rice", "米")],
    "n": [("two", "两"), ("three", "三"), ("four", "四"), ("five", "五"), ("six", "六")],
}
FOOD = {
    "dog": ("meat", "肉"),
    "cat": ("fish", "鱼"),
    "goat": ("leaves", "树叶"),
    "duck": ("bread", "面包"),
    "pony": ("carrots", "胡萝卜"),
}


def _plan(rng: Random) -> tuple[tuple[str, ...], str, str, list[dict[str, str]]]:
    """A compatible plot, time and weather, and the slots in both languages."""
    plot = rng.choice(PLOTS)
    unsuited = plot[-1].split()
    time = rng.choice([key for key in TIMES if key not in unsuited])
    weather = rng.choice([key for key in TIMES[time][2].split() if key not in unsuited])
    drawn = {name: rng.choice(words) for name, words in SLOTS.items()}
    drawn["food"] = FOOD[drawn["animal"][0]]
    return plot, time, weather, [{name: words[i] for name, words in drawn.items()} for i in (0, 1)]


def story_en(rng: Random) -> str:
    """A story in English."""
    plot, time, weather, (slots, _) = _plan(rng)
    hero = rng.choice(NAMES_EN)
    if rng.random() < 0.6:
        relative = rng.choice(RELATIVES_EN)
        other, full = f"{'his' if hero in BOYS_EN else 'her'} {relative}", f"{hero}'s {relative}"
    else:
        other = full = rng.choice([name for name in NAMES_EN if name != hero])
    slots.update(a=hero, b=other, B=other[0].upper() + other[1:], full=full, p=rng.choice(PLACES_EN))
    event, action, ending = (part.format(**slots) for part in plot[:3])
    sentences = [
        f"{TIMES[time][0]}, {event}.",
        f"{WEATHER[weather][0]}.",
        f"{action}.",
        f"{ending}.",
        f"{hero} was {rng.choice(FEELINGS_EN)}.",
    ]
    if rng.random() < 0.5:
        sentences.append(rng.choice(LESSONS_EN))
    if rng.random() < 0.3 and time != "sunday":
        sentences.insert(0, f"Once upon a time there was a child called {hero} who lived near {rng.choice(PLACES_EN)}.")
    return " ".join(sentences)


def story_zh(rng: Random) -> str:
    """A story in Chinese."""
    plot, time, weather, (_, slots) = _plan(rng)
    hero = rng.choice(NAMES_ZH)
    if rng.random() < 0.6:
        other = rng.choice(RELATIVES_ZH)
        full = f"{hero}的{other}"
    else:
        other = full = rng.choice([name for name in NAMES_ZH if name != hero])
    slots.update(a=hero, b=other, full=full, p=rng.choice(PLACES_ZH))
    event, action, ending = (part.format(**slots) for part in plot[3:6])
    sentences = [
        f"{TIMES[time][1]}，{event}。",
        f"{WEATHER[weather][1]}。",
        f"{action}。",
        f"{ending}。",
        f"{hero}{rng.choice(FEELINGS_ZH)}。",
    ]
    if rng.random() < 0.5:
        sentences.append(rng.choice(LESSONS_ZH))
    if rng.random() < 0.3 and time != "sunday":
        sentences.insert(0, f"从前有个孩子叫{hero}，住在{rng.choice(PLACES_ZH)}附近。")
    return "".join(sentences)


# Sentences that use the words of the identity stage in other contexts.
REMARKS_EN = [
    '"I am hungry," said {a}.',
    '"I am not tired," said {a}, and ran on.',
    "{a} built a model of a ship from paper.",
    "A model is a small picture of a large thing.",
    "Chinese is a language, and so is English.",
    "{a} speaks a language that {b} does not know.",
    "A tiny bird sat on the roof and looked at {a}.",
    "The tiny key was under the bench.",
    "The dog was trained by {a} for two months.",
    "A horse that was trained well is calm.",
    "Nothing comes from nothing.",
    "{a} made soup from almost nothing.",
    "The program minimind_fast trains a language model from nothing.",
    "minimind_fast is the name of a program, and it is fast.",
    "{b} is a person, and a cat is an animal.",
    "{a}: Hello, who is there?\n{b}: It is me, {b}.",
    "{a}: Hi! What is your dog's name?\n{b}: You can call it Star.",
    "{a}: Tell me, what should I read?\n{b}: Read the book about the sea.",
    "{a}: Who are you talking to?\n{b}: I am talking to my brother.",
    "{a}: Introduce yourself to the teacher.\n{b}: Hello, I am {b}.",
    "{a}: What are you doing?\n{b}: I am reading.",
    "{a}: Are you cold?\n{b}: No, I am warm.",
    "{a}: Is this your book?\n{b}: No, this is my brother's book.",
]
REMARKS_ZH = [
    "{a}说：“我是第一个到的。”",
    "{a}用纸做了一个小船模型。",
    "模型就是把大的东西做小。",
    "汉语是一种语言，英语也是一种语言。",
    "{a}会说一种{b}不懂的语言。",
    "这只小狗训练了两个月。",
    "{a}从今天开始训练跑步。",
    "从零开始数，零后面是一。",
    "{b}从零开始学画画。",
    "minimind_fast这个程序从零开始训练一个小语言模型。",
    "minimind_fast是一个程序的名字。",
    "{a}请老师介绍一本书。",
    "人会说话，小猫不会说话。",
    "{a}：嗨，你好！\n{b}：你好，{a}。",
    "{a}：谁在门外？\n{b}：是我，{b}。",
    "{a}：你的小狗叫什么名字？\n{b}：它叫星星。",
    "{a}：我该怎么称呼你的老师？\n{b}：请称呼她王老师。",
    "{a}：你在和谁说话？\n{b}：我在和自己的弟弟说话。",
    "{a}：请你介绍一下这个公园。\n{b}：公园里有一个湖。",
    "{a}：你冷吗？\n{b}：我不冷。",
    "{a}：这是哪个国家的语言？\n{b}：这是法国的语言。",
]


def remarks_en(rng: Random) -> str:
    """Two or three remarks in English, one a line."""
    a, b = rng.sample(NAMES_EN, 2)
    return "\n".join(text.format(a=a, b=b) for text in rng.sample(REMARKS_EN, rng.randint(2, 3)))


def remarks_zh(rng: Random) -> str:
    """The same in Chinese."""
    a, b = rng.sample(NAMES_ZH, 2)
    return "\n".join(text.format(a=a, b=b) for text in rng.sample(REMARKS_ZH, rng.randint(2, 3)))
