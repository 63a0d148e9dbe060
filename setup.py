from configparser import ConfigParser
from pathlib import Path
from setuptools import setup, find_packages

ini = ConfigParser(delimiters='=')
ini.read(Path(__file__).parent/'settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']

setup(description=cfg['description'], author=cfg['author'], author_email=cfg['author_email'], keywords=cfg['keywords'].split(', '),
    python_requires=f">={cfg['min_python']}", packages=find_packages(include=[cfg['lib_name'], f"{cfg['lib_name']}.*"]), package_data={cfg['lib_name']: ['bundles/*/*']},
    install_requires=cfg['requirements'].split(), extras_require={extra: cfg[f'{extra}_requirements'].split() for extra in ('cluster', 'dev')},
    entry_points={'console_scripts': cfg['console_scripts'].split(), 'nbdev': [f"{cfg['lib_name']}={cfg['lib_name']}._modidx:d"]})
