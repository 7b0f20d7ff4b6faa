"""What the benchmarks that compare many settings share: experiments beside a main one, points, estimates, a page."""
