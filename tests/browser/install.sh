#!/bin/bash
# Installs Debian's Chromium with its driver, unless both are there: for `make test-browser`.
set -euo pipefail

refuse() {
    echo "make test-browser: $*" >&2
    exit 2
}

command -v chromium > /dev/null && command -v chromedriver > /dev/null && exit 0
command -v apt-get > /dev/null || refuse "it needs chromium and chromedriver on the PATH; here is no apt-get to install them"
as_root=()
if [ "$(id -u)" -ne 0 ]; then
    command -v sudo > /dev/null || refuse "apt-get install chromium chromium-driver fonts-inter, as root, has to come first"
    as_root=(sudo)
fi
"${as_root[@]}" apt-get update -qq
DEBIAN_FRONTEND=noninteractive "${as_root[@]}" apt-get install -qq -y --no-install-recommends chromium chromium-driver fonts-inter
