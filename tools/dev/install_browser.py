#!/usr/bin/env python3
"""Install Chromium for the test that drives the web page in a browser: as root on Debian or Ubuntu, if none is there.

    python3 tools/dev/install_browser.py

Anywhere else (not root, another system, ``NO_BROWSER=1``) nothing is done; without a browser that test is skipped, and
says so. Standard library only.
"""

import os
import shutil
import subprocess

BROWSERS = ('chromium', 'chromium-browser', 'google-chrome', 'google-chrome-stable')


def main():
    if any(shutil.which(name) for name in BROWSERS) or os.environ.get('NO_BROWSER') == '1':
        return
    if os.geteuid() != 0 or not shutil.which('apt-get'):
        return
    print('[set-up] installing chromium for the test of the web page (NO_BROWSER=1 leaves it out)', flush=True)
    env = {**os.environ, 'DEBIAN_FRONTEND': 'noninteractive'}
    apt = ['apt-get', '-qq', '-o', 'Acquire::Retries=3']
    for command in (['update'], ['install', '-y', '--no-install-recommends', 'chromium']):
        done = subprocess.run(apt + command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            reason = (done.stdout.strip().splitlines() or ['no output'])[-1]
            print(f'[set-up] WARNING: no chromium, the test of the web page will be skipped: {reason}', flush=True)
            return


if __name__ == '__main__':
    main()
