package vddk

import "context"

// libraryThumbprint returns the SHA-1 thumbprint that the library is to find.
func libraryThumbprint(ctx context.Context, p *Params) (string, error) { return p.Thumbprint, nil }
