package main

import (
	"embed"
	"fmt"
)

type completionCommand struct {
	Shell string `arg:"" name:"SHELL" enum:"bash,zsh,fish" help:"The shell that the script is for: bash, zsh or fish."`
}

// The scripts know nothing about the commands and flags. They ask vddkcp what the words of the
// command line can become, with completeWord as the first word.
//
//go:embed completion/vddkcp.bash completion/vddkcp.zsh completion/vddkcp.fish
var completionScripts embed.FS

// Run prints the completion script.
func (c *completionCommand) Run() error {
	script, err := completionScripts.ReadFile("completion/vddkcp." + c.Shell)
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(textOutput, "%s", script)
	return err
}
