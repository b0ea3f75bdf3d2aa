from benchmarks.suites import layers

SUITE = layers


def test_layers(benchmark, contestant):
    contestant.time(benchmark)
