# Completion of moco's programs, as moco-train and as python -m moco.train. After compinit:
#   eval "$(python -m moco.train --shell-completion install=zsh)"

_moco_python='@PYTHON@'
_moco_root='@ROOT@'
_moco_programs=(@PROGRAMS@)

# Complete one program, whose name is the argument.
_moco_complete() {
    local -a answers finished
    answers=("${(@f)$(PYTHONPATH=$_moco_root PYTHONSAFEPATH=1 \
        $_moco_python -m moco.cli.completion $1 "$PREFIX" "$words" 2>/dev/null)}")
    answers=(${answers:#})
    if (( $#answers == 0 )); then
        compset -P '*='
        _files
        return
    fi
    finished=(${answers:#*[=.]})
    answers=(${(M)answers:#*[=.]})
    compadd -S '' -- $answers
    compadd -- $finished
}

_moco_script() {
    _moco_complete ${service#moco-}
}

_moco_module() {
    local number=${words[(i)-m]} name
    name=${words[number + 1]}
    if (( number + 1 == CURRENT )) && [[ -n $PREFIX && moco. == ${PREFIX[1,5]}* ]]; then
        compadd -- moco.$^_moco_programs
        return
    fi
    if (( number + 1 < CURRENT )) && [[ $name == moco.* ]]; then
        if (( ${_moco_programs[(Ie)${name#moco.}]} )); then
            _moco_complete ${name#moco.}
            return
        fi
    fi
    _python "$@"
}

compdef _moco_script moco-$^_moco_programs
compdef _moco_module python python3 ${_moco_python:t}
