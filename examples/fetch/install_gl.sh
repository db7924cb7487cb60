#!/bin/sh
# MuJoCo renders without a screen or a GPU through EGL. Installs Mesa's library where that is possible, says how where not.
set -eu
if ldconfig -p 2>/dev/null | grep -q 'libEGL\.so\.1' && ldconfig -p | grep -q 'libEGL_\(mesa\|nvidia\)'; then
    exit 0
fi
packages="libegl1 libegl-mesa0 libgl1 libgl1-mesa-dri libopengl0"
if [ "$(uname -s)" = Linux ] && command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
    apt-get -qq update
    DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends $packages >/dev/null
elif [ "$(uname -s)" = Linux ]; then
    echo "note: the simulated robot renders through EGL, which is missing here: sudo apt-get install $packages" >&2
fi
