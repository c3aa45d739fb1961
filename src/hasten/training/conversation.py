"""Short exchanges for the chat format: small talk, lists, facts, passages, small functions.

Built from parts so that an answer is coherent and ends by itself; this gives a very small model
manners, not knowledge.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from hasten.training.words import (
    CAPITALS,
    CATEGORIES,
    CITIES,
    COLORS,
    DAYS,
    FIRST_NAMES,
    JOBS,
    MONTHS,
    OPPOSITES,
    WORDS,
)

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are hasten's reference model. Answer briefly.",
    "Answer in one or two sentences.",
    "You are a friendly assistant that answers questions about Python and about the given text.",
    "Be short and exact.",
)


@dataclass(frozen=True)
class Exchange:
    """A user's turn and the assistant's answer."""

    user: str
    assistant: str


def pick(rng: random.Random, *choices: str) -> str:
    return rng.choice(choices)


def joined(items: list[str]) -> str:
    """``a, b and c``."""
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]


def greeting(rng: random.Random) -> Exchange:
    name = rng.choice(FIRST_NAMES)
    hello = pick(rng, "Hello", "Hi", "Hey", "Good morning", "Good evening", "Good afternoon")
    if rng.random() < 0.4:
        intro = pick(rng, f"I am {name}", f"my name is {name}", f"this is {name}")
        user = f"{hello}, {intro}{pick(rng, '.', '!')}"
        reply = pick(
            rng,
            f"Hello {name}! How can I help you today?",
            f"Hi {name}, nice to meet you. What can I do for you?",
            f"Good to meet you, {name}. What would you like to know?",
        )
        return Exchange(user, reply)
    user = f"{hello}{pick(rng, '.', '!', '')}"
    reply = pick(
        rng,
        "Hello! How can I help you today?",
        "Hi! What can I do for you?",
        "Hello, good to see you. What would you like to know?",
        "Hi there! Ask me anything about the text or the code you have.",
    )
    return Exchange(user, reply)


def about_me(rng: random.Random) -> Exchange:
    user = pick(
        rng,
        "Who are you?",
        "What are you?",
        "Tell me about yourself.",
        "Are you a person?",
        "What is your name?",
        "Introduce yourself.",
    )
    reply = pick(
        rng,
        "I am the reference model of hasten, a very small language model made for tests.",
        "I am a small language model. I was trained on Python code and on short generated tasks.",
        "I am hasten's reference model: small, fast, and good at copying and looking things up.",
    )
    return Exchange(user, reply)


def abilities(rng: random.Random) -> Exchange:
    user = pick(
        rng,
        "What can you do?",
        "How can you help me?",
        "Help",
        "What are you good at?",
        "Can you help me?",
        "What should I ask you?",
    )
    skills = rng.sample(
        [
            "look up values in a table",
            "repeat a text exactly",
            "answer questions about a short passage",
            "fill in JSON",
            "rename a variable in code",
            "sort or reverse a list",
            "add and subtract small numbers",
            "write a small Python function",
            "name the opposite of a word",
        ],
        rng.randint(2, 4),
    )
    reply = pick(
        rng, "I can {}.", "I can {}. Just ask.", "Sure. I can {}.", "For example, I can {}."
    ).format(joined(skills))
    return Exchange(user, reply)


def courtesy(rng: random.Random) -> Exchange:
    user, replies = rng.choice(
        (
            ("How are you?", ("I am fine, thank you. How are you?", "Very well, thank you!")),
            ("How are you today?", ("I am well, thank you. What can I do for you?",)),
            ("Thank you!", ("You are welcome!", "My pleasure.", "Glad that I could help.")),
            ("Thanks", ("You are welcome.", "Any time!", "Happy to help.")),
            ("Thanks for your help.", ("You are welcome. Ask again any time.",)),
            ("Goodbye!", ("Goodbye! Have a nice day.", "See you soon!")),
            ("Bye", ("Bye! Come back any time.", "Goodbye, and good luck!")),
            ("Good night.", ("Good night! Sleep well.",)),
            ("I am happy today.", ("I am glad to hear that! What made your day?",)),
            ("I am tired.", ("Then a short break may help. Drink some water and rest.",)),
            ("I am bored.", ("Shall we sort a list, or write a small function?",)),
            ("Are you there?", ("Yes, I am here. What do you need?",)),
            ("Sorry.", ("No problem at all.", "That is fine. Let us go on.")),
        )
    )
    return Exchange(user, rng.choice(replies))


def listing(rng: random.Random) -> Exchange:
    category = rng.choice(list(CATEGORIES))
    pool = CATEGORIES[category]
    words = ("two", "three", "four", "five", "six")
    count = rng.randint(2, min(6, len(pool)))
    items = rng.sample(pool, count)
    amount = words[count - 2]
    style = rng.randrange(3)
    ask = pick(rng, "List {} {}", "Name {} {}", "Give me {} {}", "Tell me {} {}")
    user = ask.format(amount, category)
    if style == 0:
        body = "\n".join(f"{i}. {item}" for i, item in enumerate(items, start=1))
        return Exchange(f"{user} as a numbered list.", body)
    if style == 1:
        return Exchange(f"{user} as a list.", "\n".join(f"- {item}" for item in items))
    opening = pick(rng, f"Here are {amount} {category}: ", "", "Sure: ")
    body = joined(items)
    return Exchange(f"{user}.", f"{opening}{body if opening else body[0].upper() + body[1:]}.")


def membership(rng: random.Random) -> Exchange:
    category = rng.choice(list(CATEGORIES))
    item = rng.choice(CATEGORIES[category])
    other = rng.choice([name for name in CATEGORIES if item not in CATEGORIES[name]])
    asked = rng.choice((category, other))
    user = f"Do {item} belong to {asked}?"
    if asked == category:
        return Exchange(user, f"Yes, {item} belong to {category}.")
    return Exchange(user, f"No, {item} belong to {category}, not to {other}.")


def capital(rng: random.Random) -> Exchange:
    country = rng.choice(list(CAPITALS))
    city = CAPITALS[country]
    if rng.random() < 0.7:
        user = pick(rng, f"What is the capital of {country}?", f"Name the capital of {country}.")
        return Exchange(user, f"The capital of {country} is {city}.")
    return Exchange(
        f"Which country has the capital {city}?", f"{city} is the capital of {country}."
    )


def opposite(rng: random.Random) -> Exchange:
    word = rng.choice(list(OPPOSITES))
    user = pick(rng, f"What is the opposite of {word}?", f"Name the opposite of {word}.")
    return Exchange(user, f"The opposite of {word} is {OPPOSITES[word]}.")


def calendar(rng: random.Random) -> Exchange:
    names, unit = rng.choice(((DAYS, "day"), (MONTHS, "month")))
    at = rng.randrange(len(names))
    if rng.random() < 0.5:
        return Exchange(
            f"Which {unit} comes after {names[at]}?",
            f"{names[(at + 1) % len(names)]} comes after {names[at]}.",
        )
    return Exchange(
        f"Which {unit} comes before {names[at]}?",
        f"{names[at - 1]} comes before {names[at]}.",
    )


def repeating(rng: random.Random) -> Exchange:
    text = " ".join(rng.choices(WORDS, k=rng.randint(1, 8)))
    user = pick(rng, "Repeat: {}", "Say: {}", "Please repeat after me: {}", "Echo {}").format(text)
    return Exchange(user, text)


def word_list(rng: random.Random) -> Exchange:
    items = rng.sample(WORDS, rng.randint(2, 6))
    text = ", ".join(items)
    kind = rng.randrange(6)
    if kind == 0:
        return Exchange(f"Sort these words: {text}", ", ".join(sorted(items)))
    if kind == 1:
        return Exchange(f"Reverse the list: {text}", ", ".join(items[::-1]))
    if kind == 2:
        return Exchange(f"How many words are there: {text}?", f"There are {len(items)} words.")
    if kind == 3:
        return Exchange(f"What is the first word of: {text}?", f"The first word is {items[0]}.")
    if kind == 4:
        return Exchange(f"What is the last word of: {text}?", f"The last word is {items[-1]}.")
    return Exchange(
        f"Write these as a Python list: {text}",
        "[" + ", ".join(f'"{item}"' for item in items) + "]",
    )


def counting(rng: random.Random) -> Exchange:
    start, count = rng.randint(0, 20), rng.randint(3, 8)
    if rng.random() < 0.5:
        numbers = list(range(start, start + count))
        user = f"Count from {numbers[0]} to {numbers[-1]}."
    else:
        numbers = list(range(start + count - 1, start - 1, -1))
        user = f"Count down from {numbers[0]} to {numbers[-1]}."
    return Exchange(user, ", ".join(map(str, numbers)))


def word_problem(rng: random.Random) -> Exchange:
    name, thing = rng.choice(FIRST_NAMES), rng.choice(CATEGORIES["fruits"])
    a, b = rng.randint(2, 30), rng.randint(1, 20)
    if rng.random() < 0.5:
        user = f"{name} has {a} {thing} and gets {b} more. How many {thing} does {name} have?"
        return Exchange(user, f"{a} + {b} = {a + b}. {name} has {a + b} {thing}.")
    a, b = max(a, b), min(a, b)
    user = f"{name} has {a} {thing} and eats {b}. How many {thing} are left?"
    return Exchange(user, f"{a} - {b} = {a - b}. There are {a - b} {thing} left.")


def passage(rng: random.Random, count: int = 0) -> Exchange:
    """Facts about ``count`` people in prose, and a question about one of them."""
    people = rng.sample(FIRST_NAMES, min(count, len(FIRST_NAMES) - 1) or rng.randint(2, 5))
    facts = []
    for name in people:
        facts.append(
            {
                "name": name,
                "city": rng.choice(CITIES),
                "job": rng.choice(JOBS),
                "color": rng.choice(COLORS),
                "pet": pick(rng, "a cat", "a dog", "a horse", "a parrot", "a rabbit", "a turtle"),
                "age": str(rng.randint(18, 79)),
            }
        )
    sentences = []
    told = rng.sample(["city", "job", "color", "pet", "age"], rng.randint(2, 4))
    say = {
        "city": ("{name} lives in {city}.", "{name} has a flat in {city}."),
        "job": ("{name} is {job}.", "{name} works as {job}."),
        "color": ("The favorite color of {name} is {color}.", "{name} likes {color} best."),
        "pet": ("{name} has {pet}.", "{name} owns {pet}."),
        "age": ("{name} is {age} years old.",),
    }
    for fact in facts:
        sentences += [rng.choice(say[key]).format(**fact) for key in told]
    if rng.random() < 0.5:
        rng.shuffle(sentences)
    one, key = rng.choice(facts), rng.choice(told)
    ask = {
        "city": ("Where does {name} live?", "{name} lives in {city}."),
        "job": ("What is the job of {name}?", "{name} is {job}."),
        "color": ("Which color does {name} like best?", "{name} likes {color} best."),
        "pet": ("Which pet does {name} have?", "{name} has {pet}."),
        "age": ("How old is {name}?", "{name} is {age} years old."),
    }
    question, reply = ask[key]
    if rng.random() < 0.15:
        stranger = rng.choice([name for name in FIRST_NAMES if name not in people])
        user = " ".join(sentences) + " " + question.format(name=stranger)
        return Exchange(user, f"The text does not say anything about {stranger}.")
    if rng.random() < 0.3 and key != "age":
        value = one[key]
        owners = [fact["name"] for fact in facts if fact[key] == value]
        if len(owners) > 3:
            return Exchange(" ".join(sentences) + " " + question.format(**one), reply.format(**one))
        who = {
            "city": f"Who lives in {value}?",
            "job": f"Who is {value}?",
            "color": f"Who likes {value} best?",
            "pet": f"Who has {value}?",
        }[key]
        return Exchange(" ".join(sentences) + " " + who, joined(owners) + ".")
    return Exchange(" ".join(sentences) + " " + question.format(**one), reply.format(**one))


def story(rng: random.Random) -> Exchange:
    name, city = rng.choice(FIRST_NAMES), rng.choice(CITIES)
    thing, other, color = rng.choice(WORDS), rng.choice(WORDS), rng.choice(COLORS)
    user = pick(
        rng, f"Tell me a short story about {name}.", f"Write a little story about {name} in {city}."
    )
    first = pick(
        rng,
        f"One day {name} walked through {city} and found a {color} {thing}.",
        f"{name} lived in a small house in {city} and owned nothing but a {color} {thing}.",
        f"Every morning {name} took the {color} {thing} and went to the market of {city}.",
    )
    second = pick(
        rng,
        f"Inside the {thing} there was a {other}.",
        f"An old friend asked for the {thing} and gave a {other} for it.",
        f"Behind the {thing} there was a door, and behind the door a {other}.",
    )
    third = pick(
        rng,
        f"{name} smiled, kept the {other}, and went home happy.",
        f"From that day on, {name} never went anywhere without the {other}.",
        f"{name} gave the {other} to a child, and that was the best part of the day.",
    )
    return Exchange(user, f"{first} {second} {third}")


CONCEPTS: dict[str, str] = {
    "a list": "A list is an ordered collection that can be changed. You write it in brackets.",
    "a tuple": "A tuple is an ordered collection that cannot be changed after it is made.",
    "a dictionary": "A dictionary maps keys to values. Each key appears once.",
    "a set": "A set is a collection without order and without duplicates.",
    "a function": "A function is a named piece of code that takes arguments and returns a result.",
    "a class": "A class describes objects: the data they hold and the methods they have.",
    "a method": "A method is a function that belongs to a class and gets the object as self.",
    "a module": "A module is a file of Python code that other code can import.",
    "a package": "A package is a folder of modules that can be imported together.",
    "a loop": "A loop repeats a block of code, once per item or while a condition is true.",
    "a generator": "A generator is a function that yields its values one at a time.",
    "an exception": "An exception reports an error. Code can catch it with try and except.",
    "a decorator": "A decorator takes a function and returns a changed function.",
    "a string": "A string is a sequence of characters. It cannot be changed in place.",
    "an integer": "An integer is a whole number, such as 7 or -3.",
    "a float": "A float is a number with a fractional part, such as 2.5.",
    "a variable": "A variable is a name that refers to a value.",
    "a lambda": "A lambda is a small function without a name, written in one expression.",
    "a thread": "A thread runs code at the same time as other threads of the same process.",
    "a process": "A process is a running program with its own memory.",
    "recursion": "Recursion means that a function calls itself on a smaller problem.",
    "a cache": "A cache keeps results so that they need not be computed again.",
    "a token": "A token is a piece of text that a language model reads or writes in one step.",
    "a tokenizer": "A tokenizer splits text into tokens and turns tokens back into text.",
    "speculative decoding": "In speculative decoding a small model proposes tokens and a large "
    "model checks several of them at once.",
    "a draft model": "A draft model is a small model that guesses what a larger one will say.",
    "a language model": "A language model predicts the next token of a text.",
    "a hash": "A hash turns data into a number of fixed size, for quick lookup.",
    "a stack": "A stack is a collection where the last item put in is the first taken out.",
    "a queue": "A queue is a collection where the first item put in is the first taken out.",
    "a test": "A test runs code and checks that the result is what we expect.",
    "a bug": "A bug is a mistake in a program that gives a wrong result.",
    "a comment": "A comment is a note for readers. Python ignores it.",
    "an argument": "An argument is a value that you pass to a function.",
    "a file": "A file holds data on disk. In Python you open it with open().",
    "JSON": "JSON is a text format for data made of objects, lists, strings and numbers.",
    "a server": "A server is a program that answers requests from other programs.",
    "a database": "A database stores data so that it can be searched and changed safely.",
}


def concept(rng: random.Random) -> Exchange:
    name = rng.choice(list(CONCEPTS))
    user = pick(
        rng,
        f"What is {name}?",
        f"Explain what {name} is.",
        f"Can you tell me what {name} is?",
        f"Define: {name}",
    )
    return Exchange(user, CONCEPTS[name])


FUNCTIONS: tuple[tuple[str, str, str], ...] = (
    ("adds two numbers", "a, b", "return a + b"),
    ("subtracts two numbers", "a, b", "return a - b"),
    ("multiplies two numbers", "a, b", "return a * b"),
    ("divides two numbers", "a, b", "return a / b"),
    ("returns the larger of two numbers", "a, b", "return a if a > b else b"),
    ("returns the smaller of two numbers", "a, b", "return a if a < b else b"),
    ("reverses a string", "text", "return text[::-1]"),
    ("counts the words of a text", "text", "return len(text.split())"),
    ("returns the length of a list", "items", "return len(items)"),
    ("sorts a list", "items", "return sorted(items)"),
    ("sums a list", "items", "total = 0\n    for item in items:\n        total += item\n"
     "    return total"),
    ("returns the largest item of a list", "items", "return max(items)"),
    ("removes duplicates from a list", "items", "return list(dict.fromkeys(items))"),
    ("checks whether a number is even", "number", "return number % 2 == 0"),
    ("checks whether a number is odd", "number", "return number % 2 == 1"),
    ("checks whether a text is a palindrome", "text", "return text == text[::-1]"),
    ("returns the square of a number", "number", "return number * number"),
    ("returns the factorial of a number", "number", "result = 1\n"
     "    for i in range(2, number + 1):\n        result *= i\n    return result"),
    ("returns the first n Fibonacci numbers", "n", "numbers = [0, 1]\n    while len(numbers) < n:\n"
     "        numbers.append(numbers[-1] + numbers[-2])\n    return numbers[:n]"),
    ("counts the vowels of a text", "text", 'return sum(letter in "aeiou" for letter in text)'),
    ("converts a text to upper case", "text", "return text.upper()"),
    ("reads a file", "path", "with open(path) as file:\n        return file.read()"),
    ("writes a text to a file", "path, text", 'with open(path, "w") as file:\n'
     "        file.write(text)"),
    ("returns the average of a list", "items", "return sum(items) / len(items)"),
    ("joins words with a comma", "words", 'return ", ".join(words)'),
    ("greets a person", "name", 'return f"Hello {name}!"'),
    ("prints a text twice", "text", "print(text)\n    print(text)"),
    ("swaps two values", "a, b", "return b, a"),
    ("counts how often each item appears", "items", "counts = {}\n    for item in items:\n"
     "        counts[item] = counts.get(item, 0) + 1\n    return counts"),
    ("keeps the even numbers of a list", "items",
     "return [item for item in items if item % 2 == 0]"),
)  # fmt: skip


def write_function(rng: random.Random) -> Exchange:
    what, parameters, body = rng.choice(FUNCTIONS)
    name = pick(
        rng,
        rng.choice(WORDS),
        f"{rng.choice(WORDS)}_{rng.choice(WORDS)}",
        "_".join(what.split()[:2]),
    )
    user = pick(
        rng,
        f"Write a function named {name} that {what}.",
        f"Write a Python function {name} that {what}.",
        f"I need a function {name} that {what}.",
        f"Please define {name}: it {what}.",
    )
    code = f"def {name}({parameters}):\n    {body}"
    if rng.random() < 0.3:
        code = f"```python\n{code}\n```"
        user += " Use a code block."
    return Exchange(user, code)


def yes_no(rng: random.Random) -> Exchange:
    a, b = rng.sample(range(100), 2)
    larger = rng.random() < 0.5
    true = (a > b) == larger
    user = f"Is {a} {'larger' if larger else 'smaller'} than {b}?"
    word = "larger" if a > b else "smaller"
    return Exchange(user, f"{'Yes' if true else 'No'}, {a} is {word} than {b}.")


KINDS: tuple[tuple[Callable[[random.Random], Exchange], float], ...] = (
    (greeting, 1.0),
    (about_me, 0.6),
    (abilities, 0.6),
    (courtesy, 1.0),
    (listing, 1.5),
    (membership, 0.6),
    (capital, 0.8),
    (opposite, 0.5),
    (calendar, 0.5),
    (repeating, 1.0),
    (word_list, 1.5),
    (counting, 0.7),
    (word_problem, 1.0),
    (passage, 4.0),
    (story, 1.2),
    (concept, 1.5),
    (write_function, 2.0),
    (yes_no, 0.6),
)


def small_exchange(rng: random.Random) -> Exchange:
    """One exchange of a random kind."""
    kinds, weights = zip(*KINDS, strict=True)
    kind: Callable[[random.Random], Exchange] = rng.choices(kinds, weights)[0]
    return kind(rng)
