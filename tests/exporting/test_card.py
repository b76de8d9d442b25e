"""The privacy section of a model card."""

from fedlora.privacy.account import epsilon
from fedlora.privacy.events import Gaussian


def test_the_model_card_of_a_private_run_states_its_guarantee(trained):
    privacy = {"unit": "client", "noise_multiplier": 1.5, "delta": 1e-2, "clip": 0.5}
    one = trained("classification", privacy=privacy, evaluate={"clients": "none"})
    section = (one.adapter / "README.md").read_text().partition("## Privacy\n\n")[2].partition("\n\n")[0]
    assert section.startswith("Differential privacy for each client: epsilon = ") and "\n" not in section
    spent = epsilon([Gaussian(1.5, count=2)], 1e-2)
    for part in (f"{spent:.4g}", "L2 norm 0.5", "2 rounds planned, 2 made", "n = 2 clients", "simulation, no guarantee"):
        assert part in section


def test_the_model_card_of_a_private_run_has_no_number_that_depends_on_who_took_part(trained):
    private = {"unit": "client", "noise_multiplier": 1.5, "delta": 1e-2, "clip": 0.5}
    cards = [
        (trained("classification", **more).adapter / "README.md").read_text()
        for more in ({}, {"privacy": private, "evaluate": {"clients": "none"}})
    ]
    assert ["Clients in the last round" in card for card in cards] == [True, False]
