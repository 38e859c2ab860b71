#!/usr/bin/env bash
# Downloads and unpacks MSR-VTT (10,000 videos with 20 captions each, several GB).
#
#   data_prep/download_msrvtt.sh DIR [URL]
#
# writes DIR/MSRVTT. An interrupted download goes on when the same command is run again. The default
# address is the copy that Bain et al. ("Frozen in Time", ICCV 2021) keep.
set -euo pipefail

usage="usage: $0 DIR [URL]"
directory=${1:?$usage}
url=${2:-https://www.robots.ox.ac.uk/~maxbain/frozen-in-time/data/MSRVTT.zip}
target=$directory/MSRVTT
archive=$directory/MSRVTT.zip
partial=$archive.part
unpacking=$directory/.MSRVTT.unpacking

fail() {
  echo "error: $*" >&2
  exit 1
}

fetch() { # goes on from where $partial ends
  if command -v curl >/dev/null; then
    curl --fail --location --show-error --retry 3 --continue-at - --output "$partial" "$url"
  else
    wget --tries=3 --continue --output-document="$partial" "$url"
  fi
}

give_up_download() {
  [[ -s $partial ]] || rm -f "$partial"
  fail "$url could not be downloaded. Run again to go on, or give another address: $usage"
}

next_step="next: python data_prep/collate_msrvtt.py -d $target -o $directory/msrvtt"
if [[ -d $target ]]; then
  echo "$target is there already; $next_step"
  exit 0
fi
command -v curl >/dev/null || command -v wget >/dev/null ||
  fail "neither curl nor wget is installed"
command -v unzip >/dev/null || fail "unzip is not installed"
mkdir -p "$directory"

if [[ ! -f $archive ]]; then
  # A download that was whole but not yet renamed has nothing left to fetch, which servers refuse.
  unzip -tqq "$partial" >/dev/null 2>&1 || fetch ||
    give_up_download
  unzip -tqq "$partial" >/dev/null 2>&1 || {
    size=$(wc -c <"$partial")
    rm -f "$partial"
    fail "$url: what came ($size bytes) is not a whole zip archive; it was removed, run again"
  }
  mv "$partial" "$archive"
fi

rm -rf "$unpacking"
mkdir "$unpacking"
unzip -q "$archive" -d "$unpacking" || {
  rm -rf "$unpacking"
  fail "$archive cannot be unpacked: is there room on the disk?"
}
if [[ -d $unpacking/MSRVTT ]]; then
  mv "$unpacking/MSRVTT" "$target"
  rm -rf "$unpacking"
else
  mv "$unpacking" "$target"
fi
echo "unpacked into $target ($archive can be removed); $next_step"
