"""Plain words and names that the generated tasks draw from."""

from __future__ import annotations

WORDS: tuple[str, ...] = tuple(
    """
    able acid actor address agent album alarm amber anchor angle apple april arch area arm army
    arrow artist aspect atlas atom attic author autumn badge bag baker ball band bank barn basket
    battery beach beam bean bear bell belt bench berry bird blade blanket block blue board boat
    body bone book border bottle box branch bread brick bridge brook brush bubble bucket budget
    buffer bundle button cabin cable cake camera camp canal candle canvas captain card carpet cart
    castle cat cave cedar cell center chain chair chalk change channel chapter chart check cheese
    cherry circle city clay client cliff clock cloud clover club coast coat code coffee coin color
    column comet copper copy coral corn cotton count course cover craft crane cream credit crown
    crystal cube cup current curve cycle dance dawn debt deck deer delta depth desert desk detail
    diamond dinner disk dock doctor dog dome door dragon drawer dream dress drum duck dust eagle
    earth echo edge egg elbow ember engine entry error estate event exit fabric factor falcon farm
    feather fence fern field figure filter finger fire fish flag flame flint flower foam fog
    folder forest fork format fox frame friend frost fruit garden gate gear ghost giant gift glass
    globe glove gold grain grape graph grass gravel green grid group guard guest guide guitar hall
    hammer hand harbor hat hawk hazel heart hedge helmet herb hill hinge history honey hook horse
    hotel hour house icon idea index ink input iron island ivory ivy jacket jar jewel job joint
    journal judge juice jungle kernel kettle key king kitchen kite knee knife knot label lace
    ladder lake lamp lane lantern laser lawn layer leader leaf lemon lens letter level library
    light lily limit linen link lion list lobby lock log loop lotus lunch machine magnet maple
    marble march margin market mask master match meadow medal melon memory metal meter mill mint
    mirror mixer model moment money monkey moon morning moss motor mountain mouse museum music
    nail name needle nest network night node north note number oak oasis object ocean office olive
    onion opera option orange orbit orchid order otter outer output oven owl oxygen packet page
    paint palace palm panel panda paper parcel park parrot path pattern peach pearl pebble pencil
    pepper phone photo piano picture pilot pine pixel planet plate plaza pocket poem point pond
    pool port potato prism prize process profile pump purple puzzle pyramid queen query quest
    queue quiet quilt rabbit radar radio rail rain ranch range raven reader reason record region
    report result ribbon rice ridge ring river road robin robot rock rocket roof room root rope
    rose route row ruby ruler saddle sail salad salt sample sand satin scale scarf school science
    score scout screen sea season secret seed sensor shadow shape shark sheet shelf shell shield
    ship shirt shoe shore shop signal silk silver singer sister size sketch sky smoke snow soap
    socket sofa soil song sound soup south space spark spice spider spirit spoon spring square
    stable staff stage stair star state station steam steel stem step stone storm story stream
    street string student studio sugar summer sun surface swan switch symbol syrup system table
    tail target task teacher temple tent test theory thread throat ticket tiger timber title toast
    token tomato tool torch tower town toy track trade trail train tree triangle truck trunk tulip
    tunnel turtle twig uncle unit user valley value vector velvet verse vessel view village vine
    violet violin vision voice volume wagon wall walnut water wave wax weather web week west whale
    wheat wheel whistle willow wind window wing winter wire wolf wood wool word world wreath yard
    year yellow zebra zero zone
    """.split()  # noqa: SIM905
)

FIRST_NAMES: tuple[str, ...] = tuple(
    """
    Ada Alan Alice Amir Anna Ben Bruno Carla Chen Clara Dana David Diego Elena Elif Emma Erik Eva
    Farid Felix Fiona Frank Grace Hana Hugo Ida Igor Ines Ivan Jack Jana Jorge Julia Kai Karim
    Kenji Lara Leo Lena Liam Lucy Luis Mara Marco Maria Mei Mia Milan Nadia Nils Nina Noah Nora
    Olga Omar Oscar Paul Petra Priya Quinn Rosa Ruth Sam Sara Sofia Tara Theo Tina Tom Uma Vera
    Viktor Wanda Yara Yusuf Zoe
    """.split()  # noqa: SIM905
)

CITIES: tuple[str, ...] = (
    "Amsterdam", "Ankara", "Athens", "Berlin", "Boston", "Cairo", "Cape Town", "Chicago", "Delhi",
    "Dublin", "Geneva", "Hamburg", "Hanoi", "Helsinki", "Istanbul", "Kyoto", "Lagos", "Lima",
    "Lisbon", "London", "Madrid", "Milan", "Montreal", "Nairobi", "Oslo", "Paris", "Porto",
    "Prague", "Quito", "Riga", "Rome", "Seoul", "Sofia", "Sydney", "Tokyo", "Toronto", "Vienna",
    "Warsaw", "Zagreb", "Zurich",
)  # fmt: skip

JOBS: tuple[str, ...] = (
    "a baker", "a carpenter", "a chemist", "a cook", "a dentist", "a doctor", "a driver",
    "a farmer", "a gardener", "a journalist", "a judge", "a lawyer", "a librarian", "a mechanic",
    "a musician", "a nurse", "a painter", "a pilot", "a plumber", "a programmer", "a sailor",
    "a singer", "a tailor", "a teacher", "a writer", "an actor", "an architect", "an electrician",
    "an engineer", "an engraver",
)  # fmt: skip

COLORS: tuple[str, ...] = (
    "red", "blue", "green", "yellow", "orange", "purple", "black", "white", "brown", "gray", "pink",
)  # fmt: skip

CATEGORIES: dict[str, tuple[str, ...]] = {
    "fruits": ("apples", "bananas", "cherries", "grapes", "lemons", "mangoes", "melons", "oranges",
               "peaches", "pears", "plums", "strawberries"),
    "vegetables": ("beans", "cabbage", "carrots", "onions", "peas", "peppers", "potatoes",
                   "pumpkins", "spinach", "tomatoes"),
    "animals": ("bears", "cats", "cows", "dogs", "elephants", "foxes", "horses", "lions", "owls",
                "rabbits", "tigers", "whales", "wolves"),
    "colors": COLORS,
    "tools": ("drills", "hammers", "knives", "ladders", "rulers", "saws", "scissors",
              "screwdrivers", "wrenches"),
    "drinks": ("coffee", "juice", "lemonade", "milk", "soda", "tea", "water"),
    "instruments": ("cellos", "drums", "flutes", "guitars", "harps", "pianos", "trumpets",
                    "violins"),
    "sports": ("basketball", "climbing", "cycling", "football", "hockey", "running", "skiing",
               "swimming", "tennis", "volleyball"),
    "data types in Python": ("bool", "bytes", "dict", "float", "int", "list", "set", "str",
                             "tuple"),
    "modules of the standard library": ("argparse", "asyncio", "collections", "csv", "datetime",
                                        "functools", "itertools", "json", "logging", "os",
                                        "pathlib", "random", "re", "subprocess", "threading"),
    "planets": ("Mercury", "Venus", "Earth", "Mars", "Jupiter", "Saturn", "Uranus", "Neptune"),
    "seasons": ("spring", "summer", "autumn", "winter"),
    "sorting algorithms": ("bubble sort", "heap sort", "insertion sort", "merge sort",
                           "quicksort", "selection sort"),
    "things to take on a trip": ("a camera", "a coat", "a map", "a passport", "a phone charger",
                                 "comfortable shoes", "sunscreen", "a water bottle"),
    "ways to make code faster": ("avoid repeated work", "cache results", "measure first",
                                 "move work out of loops", "use a better algorithm",
                                 "use built-in functions", "use the right data structure"),
}  # fmt: skip

CAPITALS: dict[str, str] = {
    "Argentina": "Buenos Aires", "Australia": "Canberra", "Austria": "Vienna", "Brazil": "Brasilia",
    "Canada": "Ottawa", "Chile": "Santiago", "China": "Beijing", "Denmark": "Copenhagen",
    "Egypt": "Cairo", "Finland": "Helsinki", "France": "Paris", "Germany": "Berlin",
    "Greece": "Athens", "Hungary": "Budapest", "India": "New Delhi", "Ireland": "Dublin",
    "Italy": "Rome", "Japan": "Tokyo", "Kenya": "Nairobi", "Mexico": "Mexico City",
    "Norway": "Oslo", "Peru": "Lima", "Poland": "Warsaw", "Portugal": "Lisbon", "Spain": "Madrid",
    "Sweden": "Stockholm", "Turkey": "Ankara", "Vietnam": "Hanoi",
}  # fmt: skip

OPPOSITES: dict[str, str] = {
    "big": "small", "cold": "hot", "dark": "light", "early": "late", "easy": "hard",
    "empty": "full", "fast": "slow", "first": "last", "good": "bad", "happy": "sad",
    "heavy": "light in weight", "high": "low", "left": "right", "long": "short", "loud": "quiet",
    "near": "far", "new": "old", "open": "closed", "rich": "poor", "rough": "smooth",
    "strong": "weak", "thick": "thin", "true": "false", "wet": "dry", "young": "old",
}  # fmt: skip

DAYS: tuple[str, ...] = (
    "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday",
)  # fmt: skip
MONTHS: tuple[str, ...] = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September",
    "October", "November", "December",
)  # fmt: skip
