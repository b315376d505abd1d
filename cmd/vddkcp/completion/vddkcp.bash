# bash completion of vddkcp: source this file, or put it into
# /usr/share/bash-completion/completions/vddkcp

_vddkcp() {
    local program=${COMP_WORDS[0]/#\~/$HOME} line=${COMP_LINE:0:COMP_POINT}
    local i blanks token current reply kind prefix rest inner
    local -a words=() replies=()

    # bash breaks words at characters such as = and :, as in --flag=VALUE or vm:NAME. Put them together.
    line=${line#*"${COMP_WORDS[0]}"}
    for ((i = 1; i <= COMP_CWORD; i++)); do
        blanks=${line%%[![:space:]]*}
        line=${line#"$blanks"}
        token=${COMP_WORDS[i]}
        ((i < COMP_CWORD)) || token=$line # without what follows the cursor
        line=${line#"$token"}
        if [[ -z $blanks ]] && ((i > 1)); then
            words[-1]+=$token
        else
            words+=("$token")
        fi
    done

    # A reply replaces only the part of the word after the last such character.
    current=$token
    while [[ $current == [=:@]* ]]; do
        current=${current:1}
    done
    local skip=$((${#words[-1]} - ${#current}))

    mapfile -t replies < <("$program" __complete bash "${words[@]}" 2>/dev/null)
    kind=${replies[0]%% *} prefix=${replies[0]#* }
    COMPREPLY=()
    for reply in "${replies[@]:1}"; do
        reply=${reply%%$'\t'*}
        reply=${reply:skip}
        # bash inserts a reply as it is, also behind an opening quote.
        case $kind$current in
        none\"*)
            [[ $reply != *!* ]] || continue # nothing protects it in these quotes
            reply=${reply//\\/'\\'} reply=${reply//\"/'\"'} reply=${reply//\$/'\$'} reply=${reply//\`/'\`'}
            ;;
        none\'*) reply=${reply//\'/"'\\''"} ;;
        none*) printf -v reply %q "$reply" ;;
        esac
        [[ -z $reply ]] || COMPREPLY+=("$reply")
    done

    case $kind in
    files | folders)
        inner=${prefix:skip}
        if [[ -z $inner && -z ${COMPREPLY[*]} ]]; then
            # bash completes paths by itself, with all quotes.
            [[ $kind == files ]] || compopt -o dirnames
            return
        fi
        [[ $current != *[\"\'\\]* ]] || return
        compopt -o filenames
        rest=${current#"$inner"}
        mapfile -t replies < <(compgen -f -- "$rest")
        for reply in "${replies[@]}"; do
            COMPREPLY+=("$inner$reply")
        done
        ;;
    *)
        compopt +o bashdefault +o default
        [[ ${#COMPREPLY[@]} != 1 || ${COMPREPLY[0]} != *[:/=] ]] || compopt -o nospace
        ;;
    esac
}
complete -o bashdefault -o default -F _vddkcp vddkcp
