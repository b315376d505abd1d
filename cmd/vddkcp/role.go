package main

import (
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/vddkcp/vddkcp/vsphere/inventory"
)

// role is the role with the least privileges for vddkcp, as vddkcp check --role prints it.
type role struct {
	Privileges []rolePrivilege `json:"privileges"`
	Govc       string          `json:"govc"` // a command line that makes the role
}

type rolePrivilege struct {
	ID       string          `json:"id"`
	On       inventory.Scope `json:"on"`
	For      inventory.Use   `json:"for"`
	Optional bool            `json:"optional"` // only some copies need the privilege
}

// leastRole returns the role for all that this version of vddkcp does.
func leastRole() *role {
	always := []inventory.Use{inventory.UseFind, inventory.UseSnapshot, inventory.UseVDDK}
	r := new(role)
	r.Govc = "govc role.create vddkcp"
	for _, p := range inventory.Privileges(append(always, inventory.UseEncrypted, inventory.UsePrepareAccess)...) {
		optional := !slices.Contains(always, p.For)
		r.Privileges = append(r.Privileges, rolePrivilege{p.ID, p.On, p.For, optional})
		// The server gives the privileges of System to every role by itself.
		if !optional && !strings.HasPrefix(p.ID, "System.") {
			r.Govc += " " + p.ID
		}
	}
	return r
}

// printText prints the role for people.
func (r *role) printText(out io.Writer) error {
	table := newTable(out, "PRIVILEGE", "ON", "NEEDED", "FOR")
	for _, p := range r.Privileges {
		needed := "always"
		if p.Optional {
			needed = "sometimes"
		}
		table.line(p.ID, string(p.On), needed, string(p.For))
	}
	if err := table.flush(); err != nil {
		return err
	}
	_, err := fmt.Fprintf(out, "\nTo make a role with the privileges that are always needed:\n  %s\n"+
		"To give the role to a user, on a folder or datacenter with all VMs in it:\n  govc permissions.set -principal USER@DOMAIN -role vddkcp -propagate=true /DATACENTER\n", r.Govc)
	return err
}
