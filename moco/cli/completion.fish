# Completion of moco's programs, as moco-train and as python -m moco.train.
#   python -m moco.train --shell-completion install=fish | source

set -g _moco_python '@PYTHON@'
set -g _moco_root '@ROOT@'
set -g _moco_programs @PROGRAMS@

# Print the name of the program on the command line.
function _moco_program
    set -l before (commandline -opc)
    set -l name (string match -rg '^(?:.*/)?moco-(\w+)$' -- $before[1])
    if test -z "$name"
        set -l place (contains -i -- -m $before)
        or return 1
        set name (string match -rg '^moco\.(\w+)$' -- $before[(math $place + 1)])
    end
    contains -- "$name" $_moco_programs
    and echo $name
end

function _moco_answers
    set -l word (commandline -ct)
    set -l answers (env PYTHONPATH=$_moco_root PYTHONSAFEPATH=1 \
        $_moco_python -m moco.cli.completion (_moco_program) "$word" (commandline -cp | string collect) 2>/dev/null)
    set answers (string match -v '' -- $answers)
    if test (count $answers) -eq 0
        # Files, also behind key=.
        set -l key (string match -r '^[^=]*=' -- $word; or echo '')
        set -l value (string replace -r '^[^=]*=' '' -- $word)
        for path in (__fish_complete_path $value)
            echo $key$path
        end
        return
    end
    printf '%s\n' $answers
end

for _moco_name in $_moco_programs
    complete -c moco-$_moco_name -f -a '(_moco_answers)'
end
for _moco_name in python python3 (basename $_moco_python)
    complete -c $_moco_name -n 'string length -q -- (_moco_program)' -f -a '(_moco_answers)'
    complete -c $_moco_name -n 'string match -q -- -m (commandline -opc)[-1]' -f \
        -a 'moco.'(string join ' moco.' $_moco_programs)
end
