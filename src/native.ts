import { createRequire } from 'node:module'

import type * as Binding from '../index.js'
import { explainLoadFailure, loadEnvironment } from './load-failure.js'

export type {
  BindingCalibration,
  BindingControl,
  BindingEora,
  BindingGeneration,
  BindingModel,
  BindingQuantizedLinear,
} from '../index.js'

const require = createRequire(import.meta.url)
let binding: typeof Binding | undefined

/**
 * The addon, loaded at first use: importing the package costs nothing and cannot fail.
 *
 * @throws KintsugiError `ERR_ADDON_LOAD` with a diagnosis
 */
export function native(): typeof Binding {
  if (!binding) {
    try {
      binding = require('../index.js') as typeof Binding
    } catch (error) {
      throw explainLoadFailure(error, loadEnvironment())
    }
  }
  return binding
}
