from benchmarks.suites import students

SUITE = students


def test_students(benchmark, contestant):
    contestant.time(benchmark)
