#compdef vddkcp
# zsh completion of vddkcp: put this file as _vddkcp into a folder of $fpath.

_vddkcp() {
    local -a replies values descriptions ends
    local first reply value kind prefix

    replies=("${(@f)$("${words[1]/#\~/$HOME}" __complete zsh "${(@)words[2,CURRENT-1]}" "$PREFIX" 2>/dev/null)}")
    first=$replies[1]
    kind=${first%% *} prefix=${first#* }
    for reply in "${(@)replies[2,-1]}"; do
        value=${reply%%$'\t'*}
        if [[ $value == *[:/=] ]]; then
            ends+=("$value")
            continue
        fi
        values+=("$value")
        if [[ $reply == *$'\t'?* ]]; then
            descriptions+=("$value  -- ${reply#*$'\t'}")
        else
            descriptions+=("$value")
        fi
    done
    (( $#values )) && compadd -l -d descriptions -a values
    (( $#ends )) && compadd -S '' -a ends
    case $kind in
    files|folders)
        compset -p $#prefix
        if [[ $kind == files ]]; then _files; else _files -/; fi
        ;;
    esac
}
if [ "$funcstack[1]" = _vddkcp ]; then _vddkcp "$@"; else compdef _vddkcp vddkcp; fi
