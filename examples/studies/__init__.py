"""Two adaptations of pretrained networks to other data: what each subset is worth, beside what it costs.

python -m examples.studies.sentiment
python -m examples.studies.segmentation PATH_OF_THE_IMAGES
"""
