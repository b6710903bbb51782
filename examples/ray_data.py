"""Answers 200 prompts with two engines on a local Ray: pip install '.[ray]', then python examples/ray_data.py [MODEL]"""

from __future__ import annotations

import sys

import ray

from slipstream import distributed

model = sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m-instruct"
cities = ("Lisbon", "Nairobi", "Osaka", "Quito", "Tallinn")
ray.init(num_cpus=3, include_dashboard=False)
prompts = ray.data.from_items([{"prompt": f"{i}. A short story set in {cities[i % len(cities)]}:"} for i in range(200)])
answers = distributed.generate(
    prompts, model=model, sampling_params={"max_new_tokens": 16, "temperature": 0}, concurrency=2, batch_size=25
)
for row in answers.take_all()[:5]:
    print(row["prompt"], row["error"] or row["generated_text"])
