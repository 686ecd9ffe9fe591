"""Names and nouns for the synthetic tasks: common given names, family names and things, all single words."""

import numpy as np


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


GIVEN_NAMES = _words("""
    Ada Agnes Albert Alice Amelia Andrew Anna Anthony Arthur Barbara Beatrice Benjamin Bernard Bertha
    Brenda Carl Carmen Caroline Catherine Cecil Charles Charlotte Clara Clarence Claude Conrad Cora
    Cyril Daniel Daphne David Deborah Diana Dominic Donald Dora Doris Dorothy Douglas Edgar Edith Edmund
    Edward Edwin Eleanor Elena Elisabeth Ellen Elsa Emily Emma Eric Ernest Esther Ethel Eugene Eva
    Evelyn Felix Ferdinand Flora Florence Frances Francis Frank Frederick George Gerald Gertrude Gilbert
    Gloria Godfrey Grace Gregory Hannah Harold Harriet Harry Hector Helen Henry Herbert Hilda Horace
    Howard Hubert Hugh Ida Irene Iris Isaac Isabel Jacob James Jane Janet Jasper Jean Jerome Joan Joseph
    Josephine Joyce Judith Julia Julian Karen Kenneth Laura Lawrence Leonard Lewis Lillian Louis Louisa
    Lucy Luther Mabel Margaret Maria Marion Martha Martin Matilda Matthew Maurice Michael Mildred Miriam
    Monica Muriel Nancy Naomi Nathan Nicholas Nora Norman Oliver Olivia Oscar Oswald Pamela Patrick Paul
    Paula Peter Philip Phoebe Rachel Ralph Raymond Rebecca Reginald Richard Robert Roland Ronald Rosa
    Rupert Ruth Samuel Sarah Sidney Simon Sophia Stella Stephen Susan Sylvia Theodore Theresa Thomas
    Timothy Ursula Valerie Vera Victor Victoria Vincent Viola Virginia Walter Wanda Wilfred William
    Winifred
""")

FAMILY_NAMES = _words("""
    Abbott Acton Alden Archer Ashby Atkins Baker Baldwin Barlow Barnes Barton Baxter Becker Bennett
    Benson Bishop Blake Boyd Bradley Brennan Briggs Brooks Bryant Burke Burton Butler Byrne Calder
    Carlson Carter Carver Chandler Chapman Clark Clayton Coleman Collins Conway Cooper Cornell Craig
    Crane Crawford Croft Crosby Curtis Dalton Davies Dawson Dixon Doyle Draper Drake Duncan Dunn Eaton
    Elliot Ellis Emerson Evans Farrell Fenwick Ferguson Fielding Fisher Fleming Fletcher Forbes Foster
    Fowler Fraser Fuller Gardner Garrett Gibson Gordon Graham Granger Greene Griffin Hale Hamilton
    Hammond Hansen Harding Harmon Harper Harris Hart Hawkins Hayes Henderson Hewitt Higgins Holland
    Holloway Holmes Hooper Hopkins Horton Hudson Hughes Hunter Hutton Jackson Jarvis Jenkins Jensen
    Johnson Keating Keller Kelly Kemp Kendall Kerr Kirby Knight Lambert Larsen Lawson Leach Lindsay
    Lloyd Logan Lowell Lynch Mallory Marlow Marsh Mason Maxwell Meyer Miller Mitchell Monroe Morgan
    Morris Morton Murphy Murray Nash Nelson Newton Nolan Norris Norton Osborne Owens Page Palmer Parker
    Parsons Patterson Payne Pearson Perkins Perry Porter Potter Powell Pratt Preston Quinn Ramsey Reed
    Reynolds Rhodes Riley Roberts Robinson Rogers Rowe Russell Ryan Sanders Saunders Sawyer Schmidt
    Schultz Sharp Shaw Sheldon Sherwood Simmons Sinclair Slater Spencer Stanton Steele Stevens Stewart
    Sullivan Sutton Talbot Taylor Thornton Todd Tucker Turner Tyler Underwood Vaughan Wagner Walker
    Wallace Walsh Warren Watson Watts Weaver Webster Wells Weston Wheeler Whitman Wilcox Willis Wilson
    Winslow Wolfe Woods Wright Wyatt York Young
""")

NOUNS = _words("""
    acorn anchor anvil apple apron arrow badger balcony barley barrel basket beacon beetle bell bench
    blanket bonnet bottle bridge broom bucket button cabin candle canoe carpet castle cedar cellar
    chimney cider clover cobbler copper coral cottage cradle cricket crown curtain dagger daisy desert
    donkey dragon drum eagle ember engine falcon feather fiddle forest fountain garden goblet granite
    hammer harbor harvest hazel helmet heron honey island ivory jacket kettle kitchen ladder lantern
    lemon lizard locket lumber magnet maple marble meadow mirror mitten monkey needle nutmeg oak ocean
    orchard otter oven oyster parcel pebble pepper pigeon pillow planet plough pocket quarry rabbit
    ribbon river rocket saddle salmon school shadow silver sparrow spindle stable statue teapot temple
    thimble thunder ticket timber tunnel turnip valley velvet violin wagon walnut whistle willow window
    winter
""")

#: Other things than `NOUNS`, for training where those are for tests.
TRAIN_NOUNS = _words("""
    almond antler arch armor attic axe bagpipe bakery banner barn bathtub bee belt berry biscuit boot
    boulder bowl bracelet branch brick bubble butter cactus camel canal canyon card carrot cart cave chain
    chair cheese cherry chestnut chisel cliff cloak clock cloud coach coat coffee coin collar comb compass
    cookie cork cotton cow crab crate creek crocodile crystal cup cushion deer diamond dish dolphin door
    dove drawer dress duck elephant envelope feast fence fern fig flask flute fog fork fox frog fur gate
    ginger giraffe glacier glove goat goose grape guitar hat hawk hedge herb hill hook horn ice ink iron
    jar jewel jug jungle kite knife lace lake lamb leaf leather lily lion loaf lock lobster mango mask
    mast melon mill mole moth mouse mud mule mushroom nail nest net nut olive onion orange owl paddle pail
    palace panther parrot peach peacock pear pearl pencil penguin piano pig pine pipe plum pond pony poppy
    potato puppet purse radish raft rake rice ring rose rope rug sail salt sand saw scarf scissors seal
    shawl sheep shell shield ship shoe shovel skunk slipper snail snake soap sofa spear spider spoon
    squirrel stove straw sugar swan sword table tent thorn tiger torch tower towel toy trumpet tub tulip
    turtle umbrella vase vest village vine wasp watch wheel whip wolf wool yarn zebra
""")

#: What a speaker may call their own: "My dog's name is Rex."
RELATIONS = (
    "name",
    *(
        f"{one}'s name"
        for one in _words("""
            dog cat horse donkey parrot ship boat house farm village school street sister brother mother
            father son daughter uncle aunt cousin friend neighbour teacher doctor lawyer baker tailor cook
        """)
    ),
)

_ALL_NAMES = tuple(sorted({*GIVEN_NAMES, *FAMILY_NAMES}))
#: Every fifth name in alphabetical order is kept out of training, for questions about names never seen there.
HELD_OUT_NAMES = _ALL_NAMES[::5]
TRAIN_NAMES = tuple(name for name in _ALL_NAMES if name not in set(HELD_OUT_NAMES))

_ONSETS = (
    "",
    *_words(
        "b bl br c ch cl cr d dr f fl fr g gl gr h j k l m n p ph pl pr qu r s sh sl st t th tr v w wh y z"
    ),
)
_VOWELS = _words("a e i o u y ai au ea ee ei ia ie io oa oo ou")
_CODAS = ("", *_words("b ck d l ld ll lm m n nd ng nt r rd rn rt s sh ss st t th tt v w x"))
#: In how many ways `invented_name` can draw.
INVENTED_NAMES = (len(_ONSETS) * len(_VOWELS) * len(_CODAS)) ** 2


def invented_name(rng: np.random.Generator) -> str:
    """A name of two syllables that nobody has. Of a name out of a list a model can guess the rest; of this it
    has to remember every letter."""
    parts = (_ONSETS, _VOWELS, _CODAS) * 2
    return "".join(part[rng.integers(len(part))] for part in parts).capitalize()
