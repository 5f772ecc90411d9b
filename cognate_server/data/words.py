"""Words that the generators build their problems from: lists of this project's own, a comma between the words."""

from __future__ import annotations


def _words(text: str) -> tuple[str, ...]:
    return tuple(" ".join(word.split()) for word in text.split(","))


# Word problems.
NAMES = _words(
    """
    Abena, Aiko, Alma, Amir, Anouk, Anton, Bela, Bruno, Carmen, Cyrus, Dalia, Dario, Edda, Elio, Emeka, Esme,
    Farid, Fenna, Flora, Gita, Goran, Hana, Hugo, Ilse, Imran, Ines, Ivo, Jara, Jonas, Juno, Kaito, Keira,
    Lamia, Lars, Leila, Luca, Mabel, Malik, Marta, Milo, Nadia, Nils, Nora, Odile, Omar, Orla, Otto, Paloma,
    Pavel, Petra, Quinn, Rania, Remy, Rosa, Ruben, Sanna, Selma, Soren, Tamar, Tariq, Thea, Tomas, Uma, Viktor,
    Vera, Wanda, Wim, Xenia, Yara, Yusuf, Zelda, Zoran
    """
)
THINGS = _words(
    """
    acorns, apples, badges, balloons, beads, bolts, bookmarks, books, bricks, buttons, candles, cards, carrots,
    coins, cookies, crayons, cups, daisies, envelopes, feathers, figs, flags, folders, gears, hats, jars, kites,
    ladles, lanterns, lemons, letters, magnets, maps, marbles, muffins, mugs, napkins, needles, notebooks,
    olives, onions, oranges, pears, pebbles, pencils, photos, pins, plates, plums, postcards, puzzles, ribbons,
    rings, ropes, scarves, seeds, shells, spoons, stamps, stickers, tiles, tokens, tulips, walnuts, whistles
    """
)
PLACES = _words(
    """
    bakery, library, museum, market, school, workshop, garden, theatre, harbour, farm, station, clinic, post
    office, bookshop, florist, orchard, print shop, boatyard, observatory, bicycle shop
    """
)
HOLDERS = _words(
    """
    bag, basket, bin, bowl, box, bucket, carton, case, chest, crate, drawer, pouch, sack, tin, tray
    """
)
JOBS = _words(
    """
    baking bread, walking dogs, painting fences, fixing bicycles, tuning pianos, teaching chess, weeding
    gardens, washing windows, sorting mail, repairing clocks, cutting hedges, translating letters, guiding
    tours, mending nets
    """
)
FOODS = _words(
    """
    soup, lemonade, jam, porridge, dough, sauce, chutney, batter, granola, tea, punch, stew
    """
)
DAYS = _words(
    """
    Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday
    """
)
VEHICLES = _words(
    """
    bicycle, boat, bus, canoe, cart, ferry, scooter, sledge, train, tram, truck, van
    """
)

# Two-hop questions: names of people and things, and the syllables that names are made of.
FIRST = _words(
    """
    Ada, Anselm, Aurel, Basia, Cato, Cleo, Dorian, Edith, Enzo, Fabia, Faye, Gideon, Greta, Hedda, Henrik,
    Idris, Isolde, Joran, Kasimir, Laszlo, Leonie, Linus, Livia, Magnus, Mirela, Nestor, Noemi, Oskar, Ottilie,
    Perla, Phineas, Ramon, Rhea, Roland, Sabine, Silas, Sylvie, Tadeo, Thora, Ulric, Valeria, Vasco, Wilhelmina,
    Yannick, Zora
    """
)
ONSETS = _words(
    """
    B, Br, C, Cr, D, Dr, F, Fl, G, Gr, H, J, K, Kl, L, M, N, P, Pr, R, S, Sk, St, T, Tr, V, W, Z
    """
)
MIDDLES = _words(
    """
    a, e, i, o, u, ae, al, an, ar, el, en, er, il, in, ir, ol, on, or, ul, un
    """
)
CODAS = _words(
    """
    b, d, g, k, l, m, n, nd, r, rd, rk, s, st, th, v, x, z
    """
)
TOWN_ENDS = _words(
    """
    a, bach, by, dale, ford, gard, haven, holm, ia, mere, mouth, o, stead, ton, vik, wick
    """
)
REGION_ENDS = _words(
    """
    ania, eth, ia, land, mark, ora, shire, wen
    """
)
SURNAME_ENDS = _words(
    """
    a, e, er, ic, in, ley, man, o, ov, sen, son, ski, well
    """
)
CRAFTS = _words(
    """
    architect, astronomer, baker, botanist, cartographer, cellist, chemist, composer, engineer, geologist,
    historian, journalist, lawyer, mathematician, painter, photographer, physician, pianist, poet, sailor,
    sculptor, teacher, violinist, zoologist
    """
)
GOODS = _words(
    """
    blue glass, bronze bells, carved chess sets, cherry brandy, clay pipes, copper kettles, felt hats, fishing
    nets, goat cheese, hand-made paper, honey cakes, lace, leather gloves, linen, mechanical clocks, oak
    barrels, pear cider, porcelain, rye bread, sea salt, silver spoons, smoked trout, stained glass, tin
    soldiers, violins, walnut oil, wool carpets
    """
)
SUBJECTS = _words(
    """
    a family of lighthouse keepers, a forgotten expedition, a lost map, a siege in winter, a stolen violin, an
    orchard that never bears fruit, life on a river boat, rival clockmakers, the building of a canal, the last
    night of a theatre, two sisters at sea, a village without a name
    """
)
NOUNS = _words(
    """
    Anchor, Bridge, Candle, Comet, Garden, Harbour, Island, Lantern, Mirror, Mountain, Orchard, Raven, River,
    Shadow, Tower, Winter
    """
)
ADJECTIVES = _words(
    """
    Amber, Broken, Crimson, Distant, Endless, Frozen, Gilded, Hidden, Hollow, Last, Quiet, Second, Silent,
    Wandering
    """
)
FIRM_ENDS = _words(
    """
    & Company, & Daughters, Brothers, Foundry, Instruments, Mills, Press, Shipyard, Works
    """
)
COLLECTIONS = _words(
    """
    antique maps, beetles, carriages, coins, costumes, fossils, locks, model ships, musical boxes, stamps,
    tapestries
    """
)
