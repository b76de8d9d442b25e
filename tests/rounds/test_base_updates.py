"""Which client lacks which changes of the base."""

from fedlora.rounds.base_updates import BaseUpdateLog

LOG = BaseUpdateLog().added(2).added(5).added(6)


def test_a_new_client_lacks_all_in_their_order():
    assert LOG.pending("new") == (2, 5, 6)


def test_a_client_lacks_those_after_its_last_delivery():
    log = BaseUpdateLog().added(2).delivered(["a"]).added(5).delivered(["b"]).added(6)
    assert (log.pending("a"), log.pending("b"), log.pending("c")) == ((5, 6), (6,), (2, 5, 6))
    assert log.delivered(["a", "b", "c"]).pending("c") == ()


def test_a_client_that_reports_what_it_holds_is_believed_up_to_the_first_gap():
    told = LOG.delivered(["a", "b"]).known({"a": [2, 6], "b": [], "c": [2, 5, 6, 9]})
    assert (told.pending("a"), told.pending("b"), told.pending("c")) == ((5, 6), (2, 5, 6), ())


def test_of_clients_that_report_nothing_nothing_changes():
    assert LOG.delivered(["a"]).known({"b": [2]}).pending("a") == ()
    assert LOG.known({}) == LOG and BaseUpdateLog().delivered(["a"]) == BaseUpdateLog()
