from benchmarks.suites import embeddings

SUITE = embeddings


def test_embeddings(benchmark, counter, contestant):
    contestant.time_and_meter(benchmark)
