def near_copies(texts, against, threshold=0.8):
    s=set(against); return [t in s for t in texts]
