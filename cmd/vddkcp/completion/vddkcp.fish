# fish completion of vddkcp: put this file as vddkcp.fish into ~/.config/fish/completions.

function __vddkcp_complete
    set -l words (commandline -opc)
    set -l current (commandline -ct)
    set -l program (string replace -r '^~' $HOME -- $words[1])
    set -l replies ($program __complete fish $words[2..-1] "$current" 2>/dev/null)
    set -l first (string split -m 1 ' ' -- $replies[1])
    for reply in $replies[2..-1]
        echo $reply
    end
    contains -- "$first[1]" files folders; or return
    # fish completes paths for a command that it does not know.
    set -l path (string replace -- "$first[2]" '' "$current")
    for reply in (complete -C "__vddkcp_path $path")
        if test "$first[1]" = files; or string match -qr '^[^\t]*/(\t|$)' -- $reply
            echo "$first[2]$reply"
        end
    end
end
complete -c vddkcp -f -a '(__vddkcp_complete)'
