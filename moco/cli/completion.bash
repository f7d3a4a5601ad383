# Completion of moco's programs, as moco-train and as python -m moco.train.
#   eval "$(python -m moco.train --shell-completion install=bash)"

_moco_python='@PYTHON@'
_moco_root='@ROOT@'
_moco_programs='@PROGRAMS@'

# Complete one program, whose name is the argument.
_moco_complete() {
    local line=${COMP_LINE:0:COMP_POINT} word breaks= prefix= answer
    COMPREPLY=()
    # Within quotes readline completes file names.
    case ${COMP_WORDS[COMP_CWORD]} in \'* | \"*) return ;; esac
    line=${line//\\ /__} # an escaped blank does not end a word
    word=${line##*[[:space:]]}
    # readline replaces what follows the last of these characters alone.
    [[ $COMP_WORDBREAKS == *=* ]] && breaks+='='
    [[ $COMP_WORDBREAKS == *:* ]] && breaks+=':'
    if [[ -n $breaks && $word == *[$breaks]* ]]; then
        prefix=${word%"${word##*[$breaks]}"}
    fi
    while IFS= read -r answer; do
        [[ -n $answer ]] && COMPREPLY+=("${answer#"$prefix"}")
    done < <(PYTHONPATH=$_moco_root PYTHONSAFEPATH=1 \
        "$_moco_python" -m moco.cli.completion "$1" "$word" "$line" 2>/dev/null)
    # Without an answer readline completes file names. It takes key=PATH for one name if another
    # completion, such as Hydra's, has removed the = from COMP_WORDBREAKS.
    if [[ ${#COMPREPLY[@]} == 0 && $word == *=* && -z $prefix ]]; then
        while IFS= read -r answer; do
            [[ -d ${answer/#\~/$HOME} ]] && answer+=/
            printf -v answer %q "$answer"
            COMPREPLY+=("${word%%=*}=${answer/#\\\~/\~}")
        done < <(compgen -f -- "${word#*=}")
    fi
    if [[ ${#COMPREPLY[@]} == 1 && ${COMPREPLY[0]} != *[=./] ]]; then
        compopt +o nospace 2>/dev/null # bash 4 and newer
    fi
}

_moco_script() {
    _moco_complete "${1##*moco-}"
}

_moco_module() {
    local number name
    for ((number = 1; number < COMP_CWORD; number++)); do
        [[ ${COMP_WORDS[number]} == -m ]] || continue
        name=${COMP_WORDS[number + 1]}
        if ((number + 1 == COMP_CWORD)) && [[ -n $name ]]; then
            COMPREPLY=($(compgen -W "moco.${_moco_programs// / moco.}" -- "$name"))
            compopt +o nospace 2>/dev/null
            ((${#COMPREPLY[@]})) && return
        elif [[ $name == moco.* && " $_moco_programs " == *" ${name#moco.} "* ]]; then
            _moco_complete "${name#moco.}"
            return
        fi
        break
    done
    compopt +o nospace 2>/dev/null
    [[ -n $_moco_before ]] && "$_moco_before" "$@"
}

# What completes python otherwise. bash-completion loads it when it is first used.
if declare -F __load_completion >/dev/null; then
    __load_completion python
elif declare -F _comp_load >/dev/null; then
    _comp_load python
fi
_moco_found=$(complete -p python 2>/dev/null | sed -n 's/.* -F \([^ ]*\) .*/\1/p')
[[ $_moco_found == _moco_* ]] || _moco_before=$_moco_found
unset _moco_found

for _moco_name in $_moco_programs; do
    complete -o nospace -o default -F _moco_script "moco-$_moco_name"
done
complete -o nospace -o default -F _moco_module python python3 "${_moco_python##*/}"
unset _moco_name
