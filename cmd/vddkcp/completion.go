package main

import (
	"strings"
	"text/template"

	"github.com/alecthomas/kong"
)

type completionCommand struct {
	Shell string `arg:"" enum:"bash,zsh,fish" help:"The shell that the script is for: bash, zsh or fish."`
}

// Run prints the completion script. The script contains the names of all commands and
// flags, so that it completes a word without running vddkcp.
func (c *completionCommand) Run(app *kong.Application) error {
	return completionScripts.ExecuteTemplate(textOutput, c.Shell, completionModel(app))
}

// completion is the data for the templates of the completion scripts: the commands and
// flags that a script offers.
type completion struct {
	Commands []completedCommand
	Profile  []completedCommand // commands of vddkcp profile
	Flags    []completedFlag    // flags of all commands
}

type completedCommand struct{ Name, Help string }

type completedFlag struct {
	Name, Help string
	Short      string
	Values     []string
	Value      bool // the flag takes a value
	File       bool // the value is a path
}

func completionModel(app *kong.Application) completion {
	var m completion
	for _, command := range app.Children {
		if !command.Hidden {
			m.Commands = append(m.Commands, completedCommand{command.Name, command.Help})
		}
	}
	seen := map[string]bool{}
	var add func(commands []*kong.Node)
	add = func(commands []*kong.Node) {
		for _, command := range commands {
			for _, group := range command.AllFlags(true) {
				for _, f := range group {
					if !seen[f.Name] {
						seen[f.Name] = true
						m.Flags = append(m.Flags, completeFlag(f))
					}
				}
			}
			add(command.Children)
		}
	}
	add(app.Children)
	for _, command := range commandNamed(app, "profile").Children {
		m.Profile = append(m.Profile, completedCommand{command.Name, command.Help})
	}
	return m
}

func completeFlag(f *kong.Flag) completedFlag {
	flag := completedFlag{Name: f.Name, Help: f.Help, Value: !f.IsBool()}
	if f.Short != 0 {
		flag.Short = string(f.Short)
	}
	for _, v := range strings.Split(f.Enum, ",") {
		if v != "" {
			flag.Values = append(flag.Values, v)
		}
	}
	flag.File = flag.Value && len(flag.Values) == 0 && (strings.Contains(f.PlaceHolder, "FILE") || strings.Contains(f.PlaceHolder, "DIR"))
	return flag
}

// zshQuote escapes a text that a completion script for zsh contains between single quotes.
// The script passes the text to the functions _arguments or _describe of zsh.
func zshQuote(s string) string {
	return strings.NewReplacer("[", `\[`, "]", `\]`, ":", `\:`, "'", `'\''`).Replace(s)
}

// fishQuote escapes a text that a completion script for fish contains between single
// quotes.
func fishQuote(s string) string { return strings.NewReplacer(`\`, `\\`, "'", `\'`).Replace(s) }

var completionScripts = template.Must(template.New("").Funcs(template.FuncMap{"join": strings.Join, "zsh": zshQuote, "fish": fishQuote}).Parse(`
{{- define "bash" -}}
# bash completion of vddkcp: source it, or put it in /etc/bash_completion.d
_vddkcp() {
    local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD-1]}
    COMPREPLY=()
    # bash breaks words at =: --flag=VALUE arrives as three.
    if [[ $cur == = ]]; then cur=; elif [[ $prev == = ]]; then prev=${COMP_WORDS[COMP_CWORD-2]}; fi
    case $prev in
{{- range .Flags}}{{if .Values}}
    --{{.Name}}) COMPREPLY=($(compgen -W '{{join .Values " "}}' -- "$cur")); return ;;{{else if .File}}
    --{{.Name}}) COMPREPLY=($(compgen -f -- "$cur")); return ;;{{else if .Value}}
    --{{.Name}}) return ;;{{end}}{{end}}
    completion) COMPREPLY=($(compgen -W 'bash zsh fish' -- "$cur")); return ;;
    profile) [[ $COMP_CWORD == 2 ]] && COMPREPLY=($(compgen -W '{{range .Profile}}{{.Name}} {{end}}' -- "$cur")) && return ;;
    esac
    if [[ $cur == -* ]]; then
        COMPREPLY=($(compgen -W '{{range .Flags}}--{{.Name}} {{end}}' -- "$cur"))
        return
    fi
    COMPREPLY=($(compgen -f -- "$cur"))
    if [[ $COMP_CWORD == 1 ]]; then
        COMPREPLY+=($(compgen -W '{{range .Commands}}{{.Name}} {{end}}' -- "$cur"))
    fi
}
complete -o filenames -F _vddkcp vddkcp
{{end}}
{{- define "zsh" -}}
#compdef vddkcp
# zsh completion of vddkcp: put it as _vddkcp in a folder of $fpath
_vddkcp() {
    local -a commands=({{range .Commands}}
        '{{.Name}}:{{zsh .Help}}'{{end}}
    )
    _arguments \{{range .Flags}}
        '--{{.Name}}{{if .Value}}={{end}}[{{zsh .Help}}]{{if .Values}}:value:({{join .Values " "}}){{else if .File}}:file:_files{{else if .Value}}:value:{{end}}' \{{end}}
        '1: :{ _describe command commands; _files }' \
        '*: :{ if (( CURRENT == 3 )) && [ "$words[2]" = profile ]; then _values command {{range .Profile}}{{.Name}} {{end}}; else _files; fi }'
}
if [ "$funcstack[1]" = _vddkcp ]; then _vddkcp "$@"; else compdef _vddkcp vddkcp; fi
{{end}}
{{- define "fish" -}}
# fish completion of vddkcp: put it in ~/.config/fish/completions/vddkcp.fish
{{range .Commands}}complete -c vddkcp -n __fish_use_subcommand -a {{.Name}} -d '{{fish .Help}}'
{{end}}complete -c vddkcp -f -n '__fish_seen_subcommand_from completion' -a 'bash zsh fish'
complete -c vddkcp -f -n '__fish_seen_subcommand_from profile' -a '{{range .Profile}}{{.Name}} {{end}}'
{{range .Flags}}complete -c vddkcp -l {{.Name}}{{with .Short}} -s {{.}}{{end}} -d '{{fish .Help}}'{{if .Values}} -x -a '{{join .Values " "}}'{{else if .File}} -r{{else if .Value}} -x{{end}}
{{end}}{{end}}`))
