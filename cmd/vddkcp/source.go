package main

import sourceopen "vddkcp/source/open"

// sourceFlags are the flags of every command that opens a source, by
// docs/cli.md.
type sourceFlags struct {
	SourceFormat string   `help:"Format of SRC instead of probing it: raw or vmdk." enum:",raw,vmdk" default:"" placeholder:"FORMAT" group:"Source:"`
	AllowPath    []string `help:"Folder that SRC may name files in, beside its own (repeatable; / for all)." placeholder:"DIR" sep:"none" group:"Source:"`
	SingleLink   bool     `help:"Read SRC without its parents: what it lacks is not here, not zeros." group:"Source:"`
}

// opener opens sources as the flags say, but for SourceFormat, which is an
// argument of its Open.
func (f *sourceFlags) opener() *sourceopen.Opener {
	return &sourceopen.Opener{AllowPath: f.AllowPath, SingleLink: f.SingleLink}
}
