"""Words shared by several tasks; common words, so that most tokenizers encode each as one token."""

MALE_NAMES = (
    "Adam", "Alan", "Andrew", "Anthony", "Ben", "Brian", "Carl", "Charles", "Chris", "Daniel", "David", "Edward",
    "Eric", "Frank", "George", "Henry", "Jack", "Jacob", "James", "Jason", "John", "Joseph", "Justin", "Kevin", "Luke",
    "Mark", "Martin", "Matthew", "Michael", "Patrick", "Paul", "Peter", "Richard", "Robert", "Ryan", "Scott", "Simon",
    "Steven", "Thomas", "Tim", "Tom", "William",
)  # fmt: skip
FEMALE_NAMES = (
    "Alice", "Amanda", "Amy", "Anna", "Anne", "Barbara", "Carol", "Christine", "Claire", "Diana", "Elizabeth", "Emily",
    "Emma", "Helen", "Jane", "Jennifer", "Jessica", "Julia", "Karen", "Kate", "Kelly", "Laura", "Linda", "Lisa", "Lucy",
    "Maria", "Mary", "Michelle", "Nancy", "Rachel", "Rebecca", "Rose", "Ruth", "Sara", "Sarah", "Susan", "Victoria",
)  # fmt: skip
NAMES = (*MALE_NAMES, *FEMALE_NAMES)

OBJECTS = (
    "apple", "ball", "basket", "book", "bottle", "box", "cake", "camera", "card", "coat", "cup", "drink", "flower",
    "hat", "key", "lamp", "letter", "map", "mirror", "necklace", "pen", "picture", "plate", "ring", "rope", "snack",
    "ticket", "toy", "watch",
)  # fmt: skip
PLACES = (
    "airport", "bank", "beach", "bridge", "church", "garden", "harbor", "hospital", "hotel", "house", "library",
    "market", "museum", "office", "park", "restaurant", "river", "school", "shop", "station", "store", "theater",
)  # fmt: skip
PLAIN_WORDS = (
    "air", "arm", "art", "bar", "bed", "bird", "blue", "boat", "body", "cat", "city", "cold", "day", "dog", "door",
    "earth", "eye", "face", "fire", "fish", "food", "foot", "game", "gold", "green", "hair", "hand", "head", "heart",
    "hill", "ice", "iron", "king", "lake", "land", "light", "line", "moon", "music", "night", "paper", "rain", "red",
    "road", "rock", "room", "sea", "ship", "snow", "song", "star", "stone", "sun", "table", "tree", "wall", "water",
    "wind", "wood", "world",
)  # fmt: skip
